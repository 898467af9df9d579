package build

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
)

// baseImage is a resolved image.
type baseImage struct {
	*cache.Image
	config dockerspec.DockerOCIImage
}

// images resolves image names, each only once in a build: what a tag leads to
// must not change while it runs.
type images struct {
	from  *cache.Images
	mu    sync.Mutex
	known map[string]*call[*baseImage]
}

// resolve returns the image called name for a platform.
func (r *images) resolve(ctx context.Context, name string, platform ocispec.Platform) (*baseImage, error) {
	key := name + " " + platforms.FormatAll(platform)
	r.mu.Lock()
	c, ok := r.known[key]
	if !ok {
		c = &call[*baseImage]{}
		r.known[key] = c
	}
	r.mu.Unlock()
	return c.do(ctx, func() (*baseImage, error) {
		ref, err := registry.ParseReference(name)
		if err != nil {
			return nil, err
		}
		img, err := r.from.Resolve(ctx, ref, platform)
		if err != nil {
			return nil, err
		}
		b := &baseImage{Image: img}
		if err := json.Unmarshal(img.Config, &b.config); err != nil {
			return nil, fmt.Errorf("config of %s: %w", ref.Familiar(), err)
		}
		return b, nil
	})
}

func (b *Builder) volumes() []*cache.Disk {
	return append([]*cache.Disk{b.opts.Volume}, b.opts.Shared...)
}

// resolveBases resolves the images of all stages that the target needs, all
// at once, and takes over what these bring as ONBUILD, which can make further
// stages necessary.
func (p *plan) resolveBases(ctx context.Context, imgs *images) error {
	for {
		group, gctx := errgroup.WithContext(ctx)
		for _, st := range p.needed() {
			if st.from != nil || st.image != nil || st.base == scratch {
				continue
			}
			group.Go(func() error {
				platform := p.targets.image
				if st.platform != nil {
					platform = *st.platform
				}
				img, err := imgs.resolve(gctx, st.base, platform)
				if err != nil {
					return p.file.errorAt(st.where, p.suggestStage(st.base, err))
				}
				st.image = img
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		more, err := p.takeOnbuild()
		if err != nil || !more {
			return err
		}
		if err := p.checkCycles(); err != nil {
			return err
		}
	}
}
