package build

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// execution is a step that is being run.
type execution struct {
	solver *solver
	step   *step
	below  []*layer
	report *progress.Step
	start  time.Time
	now    int64 // for files that have no time of their own
}

// draft returns a draft on top of the files below the step.
func (e *execution) draft(ctx context.Context) (*snapshot.Draft, error) {
	v, err := e.solver.viewOf(ctx, e.below)
	if err != nil {
		return nil, err
	}
	return snapshot.NewDraft(v), nil
}

// write makes the layer that consists of the changes of a draft. The next step
// can build on it at once; the blob is made in the background.
func (e *execution) write(ctx context.Context, d *snapshot.Draft) (*layer, error) {
	changes, err := d.Changes(ctx)
	if err != nil {
		return nil, err
	}
	l := &layer{blob: newPromise[cache.Layer](), fresh: true, created: e.solver.b.opts.Now().UTC(), list: changes}
	entries := make([]snapshot.Entry, len(changes))
	for i, c := range changes {
		entries[i] = c.Entry
	}
	if l.toc, err = snapshot.NewTOC(entries); err != nil {
		return nil, err
	}
	e.finish(l, func(context.Context) ([]snapshot.Change, error) { return changes, nil })
	return l, nil
}

// finish makes the blob of a layer in the background, and stores what the step
// has come to. An error there fails the build.
func (e *execution) finish(l *layer, changes func(context.Context) ([]snapshot.Change, error)) {
	s := e.solver
	took := s.b.opts.Now().Sub(e.start).Seconds()
	s.background(func(ctx context.Context) (err error) {
		var blob cache.Layer
		defer func() {
			err = s.plan.file.errorAt(e.step.where, err)
			l.blob.keep(blob, err)
			if err == nil {
				err = e.store(ctx, l, blob, took)
			}
		}()
		if err := s.writing.Acquire(ctx, 1); err != nil {
			return context.Cause(ctx)
		}
		defer s.writing.Release(1)
		list, err := changes(ctx)
		if err != nil {
			return err
		}
		blob, err = s.writeBlob(ctx, list)
		return err
	})
}

// writeBlob writes and compresses a layer, onto the volume.
func (s *solver) writeBlob(ctx context.Context, changes []snapshot.Change) (cache.Layer, error) {
	w, err := s.b.opts.Volume.NewBlob()
	if err != nil {
		return cache.Layer{}, err
	}
	defer w.Abort()
	lw, err := snapshot.NewLayerWriter(w, s.b.opts.Compression)
	if err != nil {
		return cache.Layer{}, err
	}
	toc, err := snapshot.WriteLayer(ctx, lw, changes)
	if err != nil {
		lw.Close() // ends its goroutines
		return cache.Layer{}, err
	}
	if err := lw.Close(); err != nil {
		return cache.Layer{}, err
	}
	l := cache.Layer{Descriptor: lw.Descriptor(), DiffID: lw.DiffID()}
	if err := w.Commit(l.Digest); err != nil {
		return cache.Layer{}, err
	}
	return l, s.b.opts.Volume.PutTOC(l.DiffID, toc)
}

// store keeps the outcome of the step: on the volume, and in the remote cache.
func (e *execution) store(ctx context.Context, l *layer, blob cache.Layer, took float64) error {
	s := e.solver
	parent, err := s.parentOf(ctx, e.step, e.below)
	if err != nil {
		return err
	}
	if l.upper != "" {
		s.note(func() { s.kept = append(s.kept, keptTree{l.upper, blob.DiffID, digest.Digest(parent), false}) })
	}
	entry := cache.Entry{
		Key: e.step.recipe.Key(), Layer: blob.Descriptor, DiffID: blob.DiffID, Parent: digest.Digest(parent),
		Created: l.created, Seconds: took, Recipe: e.step.recipe.Components,
	}
	if s.b.opts.Scope != "" {
		if err := s.b.opts.Volume.Entries(s.b.opts.Scope).Store(ctx, []cache.Entry{entry}); err != nil {
			return fmt.Errorf("store in cache: %w", err)
		}
	}
	if s.b.opts.Remote == nil {
		return nil
	}
	return s.storeRemote(ctx, l, entry)
}

// storeRemote brings a layer to the remote cache; its entry follows when the
// build ends. That the cache cannot be written to does not fail the build.
func (s *solver) storeRemote(ctx context.Context, l *layer, entry cache.Entry) error {
	push := registry.Blob{Descriptor: entry.Layer, Fresh: l.fresh && entry.Layer.Size < freshSize, Open: func(ctx context.Context) (io.ReadCloser, error) {
		return s.openBlob(ctx, l)
	}}
	if _, err := s.b.opts.Remote.PushLayer(ctx, push); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.b.opts.Report.Warnf("store in remote cache: %v", err)
		return nil
	}
	s.note(func() {
		s.made = append(s.made, entry)
		s.inRemote = append(s.inRemote, entry.Layer.Digest)
	})
	return nil
}

// freshSize is the size of a new blob below which it is not worth asking a
// registry whether it has it already.
const freshSize = 64 << 10

// keptTree is a tree that was made in this build, and is to be kept on the
// volume for the next one.
type keptTree struct {
	dir    string
	diffID digest.Digest
	below  digest.Digest
	exact  bool
}

// keepTrees publishes the trees that were made. It comes last, since they have
// other paths afterwards.
func (s *solver) keepTrees() {
	for _, t := range s.kept {
		if err := s.b.opts.Volume.AdoptTree(t.dir, t.diffID, t.below, t.exact); err != nil {
			s.b.opts.Report.Warnf("keep a layer unpacked: %v", err)
		}
	}
}
