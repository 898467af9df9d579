package build

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/ondol-dev/ondol/pkg/cache"
)

// Build builds an image, and exports it as the request says. The result can be pushed and written as long as the
// builder's volume is open.
//
// A failure that belongs to a line of the Dockerfile is an *Error. Among its
// causes is a *sandbox.ExitError if a command has failed.
func (b *Builder) Build(ctx context.Context, req Request) (*Image, error) {
	file, err := parseDockerfile(req.Dockerfile, req.Content, func(line int, text string) {
		b.opts.Report.Warnf("%s:%d: %s", req.Dockerfile, line, text)
	})
	if err != nil {
		return nil, err
	}
	p, err := newPlan(file, &req)
	if err != nil {
		return nil, file.named(err)
	}
	buildCtx, err := openContext(&req)
	if err != nil {
		return nil, err
	}
	from := &cache.Images{Volumes: b.volumes(), Registry: b.opts.Registry, Debugf: b.opts.Report.Debugf}
	if err := p.resolveBases(ctx, &images{from: from, known: map[string]*call[*baseImage]{}}); err != nil {
		return nil, file.named(err)
	}
	gone := map[digest.Digest]bool{}
	for {
		img, err := b.solve(ctx, p, buildCtx, gone)
		err = file.named(err)
		if err == nil && req.Export != nil {
			err = req.Export(ctx, img)
		}
		var lost *lostError
		if !errors.As(err, &lost) || gone[lost.layer] {
			return img, err
		}
		gone[lost.layer] = true
		b.opts.Report.Warnf("%v: building again without it", lost)
	}
}

// storeTimeout bounds how long a build that has failed, or has been
// interrupted, goes on to store the outcome of the steps that have ended well.
const storeTimeout = 20 * time.Second

// solve makes the image of a plan. Layers that are gone are not taken from a
// cache.
func (b *Builder) solve(ctx context.Context, p *plan, buildCtx *buildContext, gone map[digest.Digest]bool) (*Image, error) {
	if err := p.dispatch(); err != nil {
		return nil, err
	}
	s := &solver{b: b, plan: p, context: buildCtx, gone: gone, writing: semaphore.NewWeighted(int64(b.opts.Parallelism))}
	img, err := s.run(ctx)
	if err == nil {
		if err := s.store(ctx); err != nil {
			b.opts.Report.Warnf("%v", err)
		}
		return img, nil
	}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	if len(s.made) > 0 {
		if err := s.store(late); err != nil {
			b.opts.Report.Warnf("%v", err)
		}
	}
	return nil, err
}

// run solves the target's files and waits for everything that was started for
// it.
func (s *solver) run(ctx context.Context) (*Image, error) {
	s.group, s.ctx = errgroup.WithContext(ctx)
	var img *Image
	s.background(func(ctx context.Context) error {
		if err := s.prepare(ctx); err != nil {
			return err
		}
		target := s.plan.target.state.files
		s.startNeeded(target, map[*fileSystem]bool{})
		layers, err := s.layers(ctx, target)
		if err != nil {
			return err
		}
		img, err = s.assemble(ctx, layers)
		return err
	})
	err := s.group.Wait()
	s.keepTrees()
	if ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)) {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return img, err
}
