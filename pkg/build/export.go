package build

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/internal/registry"
)

// blobs are the image's layers for a registry or a file, lowest first.
func (img *Image) blobs(ctx context.Context) ([]registry.Blob, error) {
	out := make([]registry.Blob, len(img.layers))
	for i, l := range img.layers {
		b, err := l.blob.wait(ctx)
		if err != nil {
			return nil, err
		}
		out[i] = registry.Blob{
			Descriptor: b.Descriptor,
			Open:       func(ctx context.Context) (io.ReadCloser, error) { return img.solver.openBlob(ctx, l) },
		}
		if repo := img.solver.holder(l, b.Digest); repo != nil {
			out[i].From = []registry.Repository{*repo}
		} else if l.fresh {
			out[i].Fresh = b.Size < freshSize
		}
	}
	return out, nil
}

// holder returns a repository that is known to have a layer's blob.
func (s *solver) holder(l *layer, blob digest.Digest) *registry.Repository {
	if l.repo != nil {
		return l.repo
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.inRemote, blob) {
		return s.b.opts.RemoteRepository
	}
	return nil
}

func (img *Image) configBlob() registry.Blob {
	return registry.Blob{Descriptor: img.config, Fresh: true, Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(img.Config)), nil
	}}
}

// Push pushes the image under all names. Layers go in parallel, and only those
// that are missing; what another repository of the registry has is mounted
// from there. The manifest goes last.
func (img *Image) Push(ctx context.Context, names ...registry.Reference) error {
	report := img.solver.b.opts.Report
	layers, err := img.blobs(ctx)
	if err != nil {
		return err
	}
	done := map[registry.Repository]bool{}
	for _, name := range names {
		step := report.Step("push " + name.String())
		if !done[name.Repository] {
			if err := img.pushBlobs(ctx, name.Repository, append(layers, img.configBlob())); err != nil {
				step.Failed(err)
				return err
			}
			done[name.Repository] = true
		}
		if err := img.solver.b.opts.Push.PushManifest(ctx, name, img.Descriptor.MediaType, img.Manifest); err != nil {
			err = fmt.Errorf("push %s: %w", name, err)
			step.Failed(err)
			return err
		}
		step.Done()
	}
	return nil
}

// transfers is how many blobs go to a registry at once for each core. Most of
// the time of one is waiting.
const transfers = 4

func (img *Image) pushBlobs(ctx context.Context, repo registry.Repository, blobs []registry.Blob) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(transfers * img.solver.b.opts.Parallelism)
	seen := map[string]bool{}
	for _, b := range blobs {
		if seen[b.Digest.String()] {
			continue
		}
		seen[b.Digest.String()] = true
		group.Go(func() error {
			how, err := img.solver.b.opts.Push.PushBlob(ctx, repo, b)
			if err == nil {
				img.solver.b.opts.Report.Debugf("push %s to %s: %s", b.Digest, repo, how)
			}
			return err
		})
	}
	return group.Wait()
}

// WriteLayout adds the image to the OCI layout in dir, which is made if it
// does not exist, under the tags of the names; without names, as the only
// image without one.
func (img *Image) WriteLayout(ctx context.Context, dir string, names ...registry.Reference) error {
	layout, err := registry.CreateLayout(dir)
	if err != nil {
		return err
	}
	layers, err := img.blobs(ctx)
	if err != nil {
		return err
	}
	for _, b := range append(layers, img.configBlob()) {
		if _, err := layout.PushBlob(ctx, b); err != nil {
			return err
		}
	}
	tags := map[string]bool{}
	for _, n := range names {
		tags[n.Tag] = true
	}
	if len(tags) == 0 {
		tags[""] = true
	}
	for tag := range tags {
		if err := layout.PushManifest(ctx, tag, img.Descriptor.MediaType, img.Manifest); err != nil {
			return err
		}
	}
	return nil
}

// WriteArchive writes the image as a tar that docker load and others read.
func (img *Image) WriteArchive(ctx context.Context, w io.Writer, names ...registry.Reference) error {
	layers, err := img.blobs(ctx)
	if err != nil {
		return err
	}
	return registry.WriteArchive(ctx, w, img.Descriptor.MediaType, img.Manifest, img.configBlob(), layers, names)
}
