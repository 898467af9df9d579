package warm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// Options say how to warm. Volume and Registry are required.
type Options struct {
	// Volume is what is warmed. It is the caller's to close.
	Volume *cache.Disk
	// Registry is where images come from.
	Registry *registry.Client
	// Platform is the one that is wanted of images for several.
	Platform ocispec.Platform
	// Parallelism bounds how many images are pulled, and how many layers of
	// each, at the same time; 0 is 3.
	Parallelism int
	// Report takes what happens; nil discards it.
	Report *progress.Reporter
}

// A Warmer brings images onto a volume. It is safe for concurrent use, and so
// is the volume: other warmers and builders may use it at the same time.
type Warmer struct{ opts Options }

// New returns a warmer.
func New(opts Options) (*Warmer, error) {
	if opts.Volume.ReadOnly() {
		return nil, fmt.Errorf("warm %s: %w", opts.Volume.Dir(), cache.ErrReadOnly)
	}
	if opts.Parallelism <= 0 {
		opts.Parallelism = 3
	}
	if opts.Report == nil {
		opts.Report = progress.New(nil)
	}
	return &Warmer{opts}, nil
}

// A Warmed says what an image has cost.
type Warmed struct {
	Image *cache.Image
	// Pulled is how many layers were fetched, and Bytes what they weighed.
	Pulled int
	Bytes  int64
}

// Pull brings images onto the volume, several at the same time. One that
// cannot be had does not keep the others from coming; all errors are returned.
func (w *Warmer) Pull(ctx context.Context, names []string) ([]Warmed, error) {
	var group errgroup.Group
	group.SetLimit(w.opts.Parallelism)
	out := make([]Warmed, len(names))
	errs := make([]error, len(names))
	for i, name := range names {
		group.Go(func() error {
			step := w.opts.Report.Step("warm " + name)
			var err error
			if out[i], err = w.pull(ctx, name); err != nil {
				errs[i] = err
				step.Failed(err)
				return nil
			}
			if out[i].Pulled == 0 {
				step.Cached("volume")
				return nil
			}
			step.Printf("%d layers, %.1f MB", out[i].Pulled, float64(out[i].Bytes)/1e6)
			step.Done()
			return nil
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return out, err
	}
	// Unpacked layers are good at once; that they outlive a crash of the
	// machine is worth waiting for here.
	return out, w.opts.Volume.Sync()
}

func (w *Warmer) pull(ctx context.Context, name string) (Warmed, error) {
	ref, err := registry.ParseReference(name)
	if err != nil {
		return Warmed{}, err
	}
	images := &cache.Images{Volumes: []*cache.Disk{w.opts.Volume}, Registry: w.opts.Registry, Debugf: w.opts.Report.Debugf}
	img, err := images.Resolve(ctx, ref, w.opts.Platform)
	if err != nil {
		return Warmed{}, err
	}
	open := func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		return images.OpenBlob(ctx, ref.Repository, desc)
	}
	pulled, bytes, err := w.layers(ctx, img.Layers, open)
	if err != nil {
		return Warmed{}, fmt.Errorf("warm %s: %w", ref.Familiar(), err)
	}
	return Warmed{img, pulled, bytes}, nil
}

// layers makes sure that all layers are on the volume, as blobs and unpacked.
func (w *Warmer) layers(ctx context.Context, layers []cache.Layer, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) (fetched int, bytes int64, err error) {
	v := w.opts.Volume
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(w.opts.Parallelism)
	chain := make([]cache.Layer, 0, len(layers))
	trees := make([]chan string, len(layers))
	for i := range trees {
		trees[i] = make(chan string, 1)
	}
	for i, l := range layers {
		below := cache.ChainOf(chain)
		chain = append(chain, l)
		if !v.HasBlob(l.Descriptor) {
			fetched++
			bytes += l.Size
		}
		group.Go(func() error {
			read := func(ctx context.Context) (io.ReadCloser, error) { return open(ctx, l.Descriptor) }
			dir, err := v.Unpack(ctx, cache.UnpackRequest{
				Layer: l, Below: below, Lower: lowerTrees(ctx, trees[:i]), Open: read, KeepBlob: true,
				Warn: func(text string) { w.opts.Report.Warnf("%s", text) },
			})
			if err != nil {
				return err
			}
			trees[i] <- dir
			// The tree may have been there without the blob.
			return v.Fetch(ctx, l.Descriptor, read)
		})
	}
	return fetched, bytes, group.Wait()
}

// lowerTrees is what the layers below show, once they are unpacked. It waits
// for them only if it is asked.
func lowerTrees(ctx context.Context, trees []chan string) snapshot.View {
	return snapshot.NewLazyView(func() (snapshot.View, error) {
		var dirs []string
		for _, c := range trees {
			select {
			case dir := <-c:
				c <- dir // for the next one who asks
				dirs = append(dirs, dir)
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		return snapshot.NewTreeView(dirs), nil
	})
}

// Names returns names without those that mean the same image as an earlier
// one, and without "scratch", which is none.
func Names(names []string) []string {
	var out []string
	seen := map[string]bool{}
	for _, n := range names {
		n = strings.TrimSpace(n)
		key := n
		if ref, err := registry.ParseReference(n); err == nil {
			key = ref.String()
		}
		if n != "" && n != "scratch" && !seen[key] {
			seen[key] = true
			out = append(out, n)
		}
	}
	return out
}
