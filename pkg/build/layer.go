package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// layer is what a step or a base image leaves behind. Its files can be used as
// soon as the layer exists; its blob follows, if the layer is new.
type layer struct {
	blob    *promise[cache.Layer]
	created time.Time
	fresh   bool // made in this build

	// Where the blob is to be had, if no volume has it.
	repo *registry.Repository
	hits []cache.Hit // all that the caches say of it, the best first

	// What is at hand of a fresh layer before its blob is.
	upper string            // the tree that a command has left
	list  []snapshot.Change // or what a copy consists of
	toc   *snapshot.TOC     // with its table

	tree call[string]
}

// knownLayer is a layer of which the blob is known from the start.
func knownLayer(l cache.Layer) *layer {
	p := newPromise[cache.Layer]()
	p.keep(l, nil)
	return &layer{blob: p}
}

// openFile returns the content of a file of a copied layer.
func (l *layer) openFile(ctx context.Context, path string) (io.ReadCloser, error) {
	i, ok := slices.BinarySearchFunc(l.list, path, func(c snapshot.Change, p string) int { return snapshot.ComparePaths(c.Path, p) })
	if !ok {
		// Whiteouts come first in their directories, out of order.
		i = slices.IndexFunc(l.list, func(c snapshot.Change) bool { return c.Path == path })
	}
	if i < 0 || l.list[i].From == nil {
		return nil, fmt.Errorf("open /%s: no content", path)
	}
	c := &l.list[i]
	if c.Type == snapshot.Hardlink {
		return l.openFile(ctx, c.Link)
	}
	return c.From.Open(ctx, c.FromPath)
}

// diffIDs waits for the diff IDs of layers.
func diffIDs(ctx context.Context, layers []*layer) ([]digest.Digest, error) {
	out := make([]digest.Digest, len(layers))
	for i, l := range layers {
		b, err := l.blob.wait(ctx)
		if err != nil {
			return nil, err
		}
		out[i] = b.DiffID
	}
	return out, nil
}

// openBlob returns the layer's blob: from a volume, or from where it is known
// to be. It is not verified.
func (s *solver) openBlob(ctx context.Context, l *layer) (io.ReadCloser, error) {
	b, err := l.blob.wait(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range s.b.volumes() {
		if f, err := v.OpenBlob(b.Descriptor); err == nil {
			return f, nil
		}
	}
	for _, h := range l.hits {
		r, err2 := h.Tier.Open(ctx, b.Descriptor)
		if err2 == nil {
			return r, nil
		}
		if !errors.Is(err2, fs.ErrNotExist) && !errors.Is(err2, registry.ErrNotFound) {
			return nil, err2
		}
		err = err2
	}
	switch {
	case err != nil:
		return nil, &lostError{b.Digest, l.hits[0].Tier.Name, err}
	case l.repo != nil:
		return s.b.opts.Registry.Blob(ctx, *l.repo, b.Descriptor)
	}
	return nil, fmt.Errorf("layer %s: it is not on the volume any more, and nowhere else", b.Digest)
}

// lostError says that a layer which a cache has an entry for cannot be had:
// the step must be run again.
type lostError struct {
	layer digest.Digest
	tier  string
	err   error
}

func (e *lostError) Error() string {
	return fmt.Sprintf("layer %s, which the cache in %s lists, cannot be had: %v", e.layer, e.tier, e.err)
}

func (e *lostError) Unwrap() error { return e.err }

// trees returns the directories of layers, lowest first, for mounting on top
// of each other. What is not unpacked yet is fetched and unpacked, several
// layers at the same time.
func (s *solver) trees(ctx context.Context, layers []*layer) ([]string, error) {
	out := make([]string, len(layers))
	group, ctx := errgroup.WithContext(ctx)
	// In order from below: a layer may have to wait for those below it, never
	// for one that has not been started.
	group.SetLimit(s.b.opts.Parallelism + 1)
	for i, l := range layers {
		if l.upper != "" {
			out[i] = l.upper
			continue
		}
		group.Go(func() error {
			var err error
			out[i], err = l.tree.do(ctx, func() (string, error) { return s.unpack(ctx, l, layers[:i]) })
			return err
		})
	}
	return out, group.Wait()
}

// unpack returns the directory of a layer on top of those below it.
func (s *solver) unpack(ctx context.Context, l *layer, below []*layer) (string, error) {
	if l.toc != nil {
		return s.writeTree(ctx, l)
	}
	b, err := l.blob.wait(ctx)
	if err != nil {
		return "", err
	}
	ids, err := diffIDs(ctx, below)
	if err != nil {
		return "", err
	}
	chain := cache.ChainID(ids...)
	for _, v := range s.b.volumes() {
		if dir, ok := v.Tree(b.DiffID, chain); ok {
			return dir, nil
		}
	}
	req := cache.UnpackRequest{
		Layer: b, Below: chain, Lower: snapshot.NewLazyView(func() (snapshot.View, error) { return s.viewOf(ctx, below) }),
		Open: func(ctx context.Context) (io.ReadCloser, error) { return s.openBlob(ctx, l) },
		Warn: func(text string) { s.b.opts.Report.Warnf("%s", text) }, KeepBlob: true,
	}
	dir, err := s.b.opts.Volume.Unpack(ctx, req)
	if errors.Is(err, snapshot.ErrDigest) {
		// The copy on a volume is damaged; that of the registry need not be.
		for _, v := range s.b.volumes() {
			v.RemoveBlob(b.Digest)
		}
		dir, err = s.b.opts.Volume.Unpack(ctx, req)
	}
	if errors.Is(err, snapshot.ErrDigest) && len(l.hits) > 0 {
		err = &lostError{b.Digest, l.hits[0].Tier.Name, err}
	}
	if err == nil && len(l.hits) > 0 && s.b.opts.Scope != "" {
		// The layer is on the volume now: say so to the next build.
		if err := s.b.opts.Volume.Entries(s.b.opts.Scope).Store(ctx, []cache.Entry{l.hits[0].Entry}); err != nil {
			s.b.opts.Report.Debugf("store in cache: %v", err)
		}
	}
	return dir, err
}

// writeTree makes the directory of a copied layer from the files that it
// consists of, without waiting for its blob.
func (s *solver) writeTree(ctx context.Context, l *layer) (string, error) {
	dir, err := s.b.opts.Volume.NewTreeDir()
	if err != nil {
		return "", err
	}
	pr, pw := io.Pipe()
	var writing sync.WaitGroup
	defer writing.Wait()
	writing.Go(func() {
		_, err := snapshot.WriteLayer(ctx, pw, l.list)
		pw.CloseWithError(err)
	})
	_, err = snapshot.Apply(ctx, pr, dir, snapshot.ApplyOptions{})
	pr.CloseWithError(err)
	if err != nil {
		return "", err
	}
	s.background(func(ctx context.Context) error {
		b, err := l.blob.wait(ctx)
		if err == nil {
			s.note(func() { s.kept = append(s.kept, keptTree{dir: dir, diffID: b.DiffID, exact: true}) })
		}
		return err
	})
	return dir, nil
}

// view returns what a file system shows.
func (s *solver) view(ctx context.Context, f *fileSystem) (snapshot.View, error) {
	layers, err := s.layers(ctx, f)
	if err != nil {
		return nil, err
	}
	return s.viewOf(ctx, layers)
}

// viewOf returns what layers show, with as little work as possible: from trees
// that are there, or from tables of contents, so that nothing is unpacked
// before content is asked for.
func (s *solver) viewOf(ctx context.Context, layers []*layer) (snapshot.View, error) {
	stack := make([]snapshot.StackLayer, len(layers))
	for i, l := range layers {
		sl, err := s.stackLayer(ctx, l, layers[:i])
		if err != nil {
			return nil, err
		}
		stack[i] = sl
	}
	return snapshot.NewStackView(stack)
}

func (s *solver) stackLayer(ctx context.Context, l *layer, below []*layer) (snapshot.StackLayer, error) {
	switch {
	case l.upper != "":
		return snapshot.StackLayer{Tree: l.upper}, nil
	case l.toc != nil:
		return snapshot.StackLayer{TOC: l.toc, Open: l.openFile}, nil
	}
	b, err := l.blob.wait(ctx)
	if err != nil {
		return snapshot.StackLayer{}, err
	}
	ids, err := diffIDs(ctx, below)
	if err != nil {
		return snapshot.StackLayer{}, err
	}
	for _, v := range s.b.volumes() {
		if dir, ok := v.Tree(b.DiffID, cache.ChainID(ids...)); ok {
			return snapshot.StackLayer{Tree: dir}, nil
		}
	}
	unpacked := func(ctx context.Context) (string, error) {
		return l.tree.do(ctx, func() (string, error) { return s.unpack(ctx, l, below) })
	}
	for _, v := range s.b.volumes() {
		if toc, err := v.TOC(b.DiffID); err == nil {
			return snapshot.StackLayer{TOC: toc, Open: func(ctx context.Context, path string) (io.ReadCloser, error) {
				dir, err := unpacked(ctx)
				if err != nil {
					return nil, err
				}
				return snapshot.NewTreeView([]string{dir}).Open(ctx, path)
			}}, nil
		}
	}
	dir, err := unpacked(ctx)
	return snapshot.StackLayer{Tree: dir}, err
}
