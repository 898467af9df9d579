package warm

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// Import brings the image in a file onto the volume, under a name. From then
// on the name means this image, and no registry is asked for it. The file is
// an OCI layout, a tar of one, a tar of docker save, or a tar of a root file
// system; inner says which image in it is meant, if it has several.
func (w *Warmer) Import(ctx context.Context, file, inner, name string) (*cache.Image, error) {
	ref, err := registry.ParseReference(name)
	if err != nil {
		return nil, err
	}
	if ref.Digest != "" {
		return nil, fmt.Errorf("import %s as %s: the name must have no digest", file, name)
	}
	step := w.opts.Report.Step(fmt.Sprintf("import %s as %s", file, ref.Familiar()))
	img, err := w.importFile(ctx, file, inner, ref)
	if err != nil {
		step.Failed(err)
		return nil, fmt.Errorf("import %s: %w", file, err)
	}
	step.Done()
	return img, w.opts.Volume.Sync()
}

func (w *Warmer) importFile(ctx context.Context, file, inner string, ref registry.Reference) (*cache.Image, error) {
	f, err := registry.OpenImageFile(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var target ocispec.Descriptor
	open := func(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		return w.opts.Volume.OpenBlob(desc)
	}
	switch f.Kind {
	case "rootfs":
		target, err = w.importRootfs(f, filepath.Base(file))
	case "docker-archive":
		target, err = w.importDocker(f, inner)
	default:
		if target, open, err = f.OCIImage(inner); err == nil {
			err = w.importManifests(ctx, target, open)
		}
	}
	if err != nil {
		return nil, err
	}
	full, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	// Everything is there but the layers: from here on it is an image like any
	// other, whose blobs come from the file.
	v := w.opts.Volume
	images := &cache.Images{Volumes: []*cache.Disk{v}, Registry: w.opts.Registry}
	pinned := ref.WithDigest(target.Digest)
	img, err := images.Resolve(ctx, pinned, w.opts.Platform)
	if err != nil {
		return nil, err
	}
	if _, _, err := w.layers(ctx, img.Layers, open); err != nil {
		return nil, err
	}
	img.Ref = ref
	return img, v.PutRef(cache.Ref{Name: ref.String(), Target: target, Checked: time.Now().UTC().Truncate(time.Second), Imported: true, From: f.Kind + " " + full})
}

// importManifests copies the target's manifests and configs to the volume:
// those of all platforms, as far as the file has them.
func (w *Warmer) importManifests(ctx context.Context, desc ocispec.Descriptor, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error {
	content, err := w.importBlob(ctx, desc, open)
	if err != nil {
		return err
	}
	var m struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(content, &m); err != nil {
		return fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	if m.Config != nil {
		_, err := w.importBlob(ctx, *m.Config, open)
		return err
	}
	for _, child := range m.Manifests {
		if child.Platform != nil && !platforms.Only(w.opts.Platform).Match(*child.Platform) {
			continue
		}
		if err := w.importManifests(ctx, child, open); err != nil {
			return err
		}
	}
	return nil
}

// maxManifest bounds what is read as a manifest or config.
const maxManifest = 8 << 20

func (w *Warmer) importBlob(ctx context.Context, desc ocispec.Descriptor, open func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) ([]byte, error) {
	r, err := open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxManifest {
		return nil, fmt.Errorf("blob %s: larger than %d bytes", desc.Digest, maxManifest)
	}
	if digest.FromBytes(b) != desc.Digest {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, snapshot.ErrDigest)
	}
	return b, w.opts.Volume.WriteBlob(b)
}

// importRootfs makes an image of one layer from the tar of a root file system.
func (w *Warmer) importRootfs(f *registry.ImageFile, name string) (ocispec.Descriptor, error) {
	r, err := f.Rootfs()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer r.Close()
	layer, err := w.importLayer(r)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	config, err := json.Marshal(ocispec.Image{
		Created: &now, Platform: w.opts.Platform,
		Config:  ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.DiffID}},
		History: []ocispec.History{{Created: &now, CreatedBy: "imported from " + name}},
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return w.writeManifest(config, []cache.Layer{layer})
}

// importDocker makes an image of what docker save has written.
func (w *Warmer) importDocker(f *registry.ImageFile, inner string) (ocispec.Descriptor, error) {
	config, open, err := f.DockerImage(inner)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var layers []cache.Layer
	for _, o := range open {
		r, err := o()
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		l, err := w.importLayer(r)
		r.Close()
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		layers = append(layers, l)
	}
	return w.writeManifest(config, layers)
}

// importLayer stores a layer's tar as a blob. One that is compressed already
// keeps its bytes, and so its digest.
func (w *Warmer) importLayer(r io.Reader) (cache.Layer, error) {
	blob, err := w.opts.Volume.NewBlob()
	if err != nil {
		return cache.Layer{}, err
	}
	defer blob.Abort()
	br := bufio.NewReaderSize(r, 1<<20)
	if magic, err := br.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		return storeCompressed(blob, br)
	}
	lw, err := snapshot.NewLayerWriter(blob, snapshot.Compression{})
	if err != nil {
		return cache.Layer{}, err
	}
	_, err = io.Copy(lw, br)
	if err2 := lw.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return cache.Layer{}, err
	}
	l := cache.Layer{Descriptor: lw.Descriptor(), DiffID: lw.DiffID()}
	return l, blob.Commit(l.Digest)
}

func storeCompressed(blob *cache.BlobWriter, r io.Reader) (cache.Layer, error) {
	plain, err := snapshot.Decompress(io.TeeReader(r, blob), ocispec.MediaTypeImageLayerGzip)
	if err != nil {
		return cache.Layer{}, err
	}
	defer plain.Close()
	diffID, err := digest.FromReader(plain)
	if err != nil {
		return cache.Layer{}, err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: blob.Digest(), Size: blob.Size()}
	return cache.Layer{Descriptor: desc, DiffID: diffID}, blob.Commit("")
}

// writeManifest stores the config and the manifest of an image.
func (w *Warmer) writeManifest(config []byte, layers []cache.Layer) (ocispec.Descriptor, error) {
	v := w.opts.Volume
	if err := v.WriteBlob(config); err != nil {
		return ocispec.Descriptor{}, err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, l.Descriptor)
	}
	b, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}, v.WriteBlob(b)
}
