package build

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/ondol-dev/ondol/pkg/cache"
)

// op is what a step does. There is one type for each instruction that changes
// files.
type op interface {
	// sources are the other file systems that the op reads.
	sources() []*fileSystem
	// define adds to a recipe everything that decides what the op's layer will
	// be, beside the files that it is made onto and the platform.
	define(ctx context.Context, s *solver, r *cache.Recipe) error
	// run makes the layer.
	run(ctx context.Context, e *execution) (*layer, error)
}

// independent is implemented by ops that do not look at the files that they
// are made onto.
type independent interface{ independent() bool }

func isIndependent(o op) bool {
	i, ok := o.(independent)
	return ok && i.independent()
}

// solver finds out what the steps of a plan amount to: from the cache, or by
// running them.
type solver struct {
	b       *Builder
	plan    *plan
	context *buildContext

	group   *errgroup.Group // everything that goes on, until the image is there
	ctx     context.Context // the group's: lives as long as run
	writing *semaphore.Weighted
	steps   int // of all stages that the target needs
	hits    map[cache.Key][]cache.Hit
	gone    map[digest.Digest]bool // layers that a cache says it has, and has not

	mu      sync.Mutex
	made    []cache.Entry // by this build
	used    []cache.Key   // found in the cache
	records []StepRecord
	kept    []keptTree
	// inRemote are the blobs that this build has brought to the remote cache.
	inRemote []digest.Digest
}

// StepRecord says what became of a step.
type StepRecord struct {
	Name    string
	Cached  bool
	From    string // the tier that had it
	Seconds float64
}

// prepare makes the keys of all steps that the target needs, in parallel, and
// asks the caches for all of them at once.
func (s *solver) prepare(ctx context.Context) error {
	var steps []*step
	for _, st := range s.plan.needed() {
		if st.state == nil || st.external {
			continue
		}
		for _, step := range st.state.files.steps() {
			if !slices.Contains(steps, step) {
				steps = append(steps, step)
			}
		}
	}
	s.steps = len(steps)
	group, gctx := errgroup.WithContext(ctx)
	for _, st := range steps {
		group.Go(func() error {
			_, err := s.stepKey(gctx, st)
			return s.plan.file.errorAt(st.where, err)
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	keys := make([]cache.Key, len(steps))
	for i, st := range steps {
		keys[i] = st.recipe.Key()
	}
	hits, err := s.b.opts.Tiers.Lookup(ctx, keys)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		s.b.opts.Report.Warnf("%v", err)
	}
	for k, list := range hits {
		hits[k] = slices.DeleteFunc(list, func(h cache.Hit) bool { return s.gone[h.Layer.Digest] })
	}
	s.hits = hits
	return nil
}

// filesKey is what identifies files by the way they come about.
func (s *solver) filesKey(ctx context.Context, f *fileSystem) (string, error) {
	switch {
	case f == nil:
		return "scratch", nil
	case f.base != nil:
		var ids []string
		for _, l := range f.base.Layers {
			ids = append(ids, l.DiffID.String())
		}
		return strings.Join(ids, " "), nil
	}
	k, err := s.stepKey(ctx, f.step)
	return k.String(), err
}

// stepKey makes the step's key.
func (s *solver) stepKey(ctx context.Context, st *step) (cache.Key, error) {
	return st.key.do(ctx, func() (cache.Key, error) {
		r := &st.recipe
		r.Add("platform", platformText(st.platform))
		if err := st.op.define(ctx, s, r); err != nil {
			return cache.Key{}, err
		}
		below := "any"
		if !isIndependent(st.op) {
			var err error
			if below, err = s.filesKey(ctx, st.below); err != nil {
				return cache.Key{}, err
			}
		}
		r.Add("below", below)
		return r.Key(), nil
	})
}

// layers returns the layers of a file system, lowest first.
func (s *solver) layers(ctx context.Context, f *fileSystem) ([]*layer, error) {
	if f == nil {
		return nil, nil
	}
	return f.solved.do(ctx, func() ([]*layer, error) {
		if f.base != nil {
			var out []*layer
			for _, l := range f.base.Layers {
				k := knownLayer(l)
				k.repo = &f.base.Ref.Repository
				out = append(out, k)
			}
			return out, nil
		}
		below, err := s.layers(ctx, f.below)
		if err != nil {
			return nil, err
		}
		l, err := s.solveStep(ctx, f.step, below)
		if err != nil {
			return nil, s.plan.file.errorAt(f.step.where, err)
		}
		return append(slices.Clip(below), l), nil
	})
}

// solveStep returns the layer of a step on top of those below.
func (s *solver) solveStep(ctx context.Context, st *step, below []*layer) (*layer, error) {
	hits, err := s.cached(ctx, st, below)
	if err != nil {
		return nil, err
	}
	if len(hits) > 0 {
		hit := hits[0]
		s.b.opts.Report.Step(s.plan.stepName(st)).Cached(hit.Tier.Name)
		s.record(StepRecord{Name: st.text, Cached: true, From: hit.Tier.Name})
		s.note(func() { s.used = append(s.used, hit.Key) })
		l := knownLayer(cache.Layer{Descriptor: hit.Layer, DiffID: hit.DiffID})
		l.created, l.hits = hit.Created, hits
		for _, h := range hits {
			if h.Tier.Repository != nil {
				l.repo = h.Tier.Repository
				break
			}
		}
		s.spread(l)
		return l, nil
	}
	// What the step reads comes first: its own time begins after that.
	for _, src := range st.op.sources() {
		if _, err := s.layers(ctx, src); err != nil {
			return nil, err
		}
	}
	report := s.b.opts.Report.Step(s.plan.stepName(st))
	start := s.b.opts.Now()
	e := &execution{solver: s, step: st, below: below, report: report, start: start, now: start.Truncate(time.Second).UnixNano()}
	l, err := st.op.run(ctx, e)
	if err != nil {
		report.Failed(err)
		return nil, err
	}
	report.Done()
	s.record(StepRecord{Name: st.text, Seconds: s.b.opts.Now().Sub(start).Seconds()})
	return l, nil
}

// cached returns the entries of the step that were made on top of the very
// layers that are below it now, and that agree with the best one on what came
// out. Where there are entries at all, it is worth waiting for what the layers
// below are.
func (s *solver) cached(ctx context.Context, st *step, below []*layer) ([]cache.Hit, error) {
	key, err := s.stepKey(ctx, st)
	if err != nil || len(s.hits[key]) == 0 {
		return nil, err
	}
	parent, err := s.parentOf(ctx, st, below)
	if err != nil {
		return nil, err
	}
	var out []cache.Hit
	for _, h := range s.hits[key] {
		if string(h.Parent) == parent && (len(out) == 0 || h.Layer.Digest == out[0].Layer.Digest) {
			out = append(out, h)
		}
	}
	return out, nil
}

// spread gives the remote cache what only a nearer tier has, so that builds on
// other machines find it too.
func (s *solver) spread(l *layer) {
	remote := s.b.opts.Remote
	if remote == nil {
		return
	}
	for _, h := range l.hits {
		if h.Tier.Table == cache.Table(remote) {
			return
		}
	}
	s.background(func(ctx context.Context) error { return s.storeRemote(ctx, l, l.hits[0].Entry) })
}

// parentOf is what an entry of the step says about the layers below.
func (s *solver) parentOf(ctx context.Context, st *step, below []*layer) (string, error) {
	if isIndependent(st.op) {
		return "", nil
	}
	ids, err := diffIDs(ctx, below)
	return string(cache.ChainID(ids...)), err
}

// background does something that the image does not exist without, beside
// everything else.
func (s *solver) background(fn func(context.Context) error) {
	s.group.Go(func() error { return fn(s.ctx) })
}

// startNeeded begins to solve, at the same time, everything that will surely
// be needed: what steps read that no cache has, and so on. What turns out to
// be needed later is solved then.
func (s *solver) startNeeded(f *fileSystem, started map[*fileSystem]bool) {
	if f == nil || started[f] {
		return
	}
	started[f] = true
	for _, st := range f.steps() {
		if len(s.hits[st.recipe.Key()]) > 0 {
			continue
		}
		for _, src := range st.op.sources() {
			if src == nil || started[src] {
				continue
			}
			s.startNeeded(src, started)
			s.background(func(ctx context.Context) error {
				_, err := s.layers(ctx, src)
				return err
			})
		}
	}
	s.startTrees(f)
}

// startTrees begins to fetch and unpack what the first command that must be
// run needs.
func (s *solver) startTrees(f *fileSystem) {
	var first *step // that will surely be run
	for ; f != nil; f = f.below {
		if f.step != nil && len(s.hits[f.step.recipe.Key()]) == 0 {
			first = f.step
		}
	}
	if first == nil {
		return
	}
	if _, ok := first.op.(*runOp); !ok {
		return
	}
	s.background(func(ctx context.Context) error {
		layers, err := s.layers(ctx, first.below)
		if err == nil {
			_, err = s.trees(ctx, layers)
		}
		return s.plan.file.errorAt(first.where, err)
	})
}

func (s *solver) note(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn()
}

func (s *solver) record(r StepRecord) { s.note(func() { s.records = append(s.records, r) }) }

// stepName is how the step is shown: "[build 2/5] RUN make".
func (p *plan) stepName(st *step) string {
	total := 0
	for _, f := range st.stage.state.files.steps() {
		if f.stage == st.stage {
			total++
		}
	}
	name := ""
	if len(p.file.stages) > 1 {
		name = p.label(st.stage) + " "
	}
	return fmt.Sprintf("[%s%d/%d] %s", name, st.number, total, st.text)
}

// store gives the outcome of this build's steps to the remote cache. It does
// what it can also if the build has failed: steps that have ended well need
// not be repeated.
func (s *solver) store(ctx context.Context) error {
	if s.b.opts.Remote == nil {
		return nil
	}
	s.mu.Lock()
	made, used := slices.Clone(s.made), slices.Clone(s.used)
	s.mu.Unlock()
	err := s.b.opts.Remote.Update(ctx, made, used)
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("store in remote cache: %w", err)
	}
	return err
}
