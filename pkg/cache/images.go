package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
)

// Images resolves image names, by a registry and volumes. What a volume has is
// not fetched again, and what is fetched is kept on the first one.
type Images struct {
	// Volumes are asked in order. The first one must be writable.
	Volumes []*Disk
	// Registry is asked what tags lead to, and for what no volume has.
	Registry *registry.Client
	// Debugf takes what helps to find a fault; nil discards it.
	Debugf func(format string, args ...any)
}

// An Image is what a name leads to for one platform: its config, and its
// layers, which need not have been fetched.
type Image struct {
	// Ref is the name as it was asked for, and with the digest to which it
	// leads.
	Ref    registry.Reference
	Target ocispec.Descriptor
	// Config is the content of the image's config.
	Config []byte
	// Blobs are the manifests on the way to the image, and its config.
	Blobs  []ocispec.Descriptor
	Layers []Layer
}

// maxConfig bounds what is read as an image's config or manifest.
const maxConfig = 8 << 20

func (r *Images) debugf(format string, args ...any) {
	if r.Debugf != nil {
		r.Debugf(format, args...)
	}
}

// Resolve returns the image that ref names, for a platform. It asks the
// registry what a tag leads to, with one HEAD request; imported images, and
// digests that a volume knows, need no registry at all.
func (r *Images) Resolve(ctx context.Context, ref registry.Reference, platform ocispec.Platform) (*Image, error) {
	img, err := r.resolve(ctx, ref, platform)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", ref.Familiar(), err)
	}
	return img, nil
}

func (r *Images) resolve(ctx context.Context, ref registry.Reference, platform ocispec.Platform) (*Image, error) {
	target, err := r.target(ctx, ref)
	if err != nil {
		return nil, err
	}
	img := &Image{Ref: ref, Target: target}
	img.Ref.Digest = target.Digest
	manifest, err := r.manifest(ctx, img, platform)
	if err != nil {
		return nil, err
	}
	if img.Config, err = r.config(ctx, ref.Repository, manifest.Config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	img.Blobs = append(img.Blobs, manifest.Config)
	var config struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(img.Config, &config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	diffIDs := config.RootFS.DiffIDs
	if len(diffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("the manifest has %d layers and the config %d", len(manifest.Layers), len(diffIDs))
	}
	for i, l := range manifest.Layers {
		if err := errors.Join(l.Digest.Validate(), diffIDs[i].Validate()); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		img.Layers = append(img.Layers, Layer{Descriptor: l, DiffID: diffIDs[i]})
	}
	r.remember(ref, target)
	return img, nil
}

// target returns the descriptor of the manifest or index that ref names.
func (r *Images) target(ctx context.Context, ref registry.Reference) (ocispec.Descriptor, error) {
	for _, v := range r.Volumes {
		if known, err := v.Ref(ref.String()); err == nil && known.Imported && v.HasBlob(known.Target) {
			return known.Target, nil
		}
	}
	if ref.Digest != "" {
		return ocispec.Descriptor{Digest: ref.Digest}, nil
	}
	return r.Registry.Head(ctx, ref)
}

// manifest returns the manifest of the image for the platform that the target
// is or lists.
func (r *Images) manifest(ctx context.Context, img *Image, platform ocispec.Platform) (*ocispec.Manifest, error) {
	desc := img.Target
	for range 4 { // an index of indexes is legal, a deep one is not sane
		content, err := r.manifestContent(ctx, img.Ref, desc)
		if err != nil {
			return nil, err
		}
		img.Blobs = append(img.Blobs, ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: int64(len(content))})
		var list struct {
			MediaType string               `json:"mediaType"`
			Manifests []ocispec.Descriptor `json:"manifests"`
		}
		if err := json.Unmarshal(content, &list); err != nil {
			return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
		if !registry.IsIndex(list.MediaType) && list.Manifests == nil {
			var m ocispec.Manifest
			if err := json.Unmarshal(content, &m); err != nil {
				return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
			}
			if m.Config.Digest.Validate() != nil {
				return nil, fmt.Errorf("manifest %s: is no image: media type %q", desc.Digest, list.MediaType)
			}
			return &m, nil
		}
		if desc, err = choosePlatform(list.Manifests, platform); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("indexes are nested too deeply")
}

// remember notes on the volume what a tag leads to, for those who come later.
func (r *Images) remember(ref registry.Reference, target ocispec.Descriptor) {
	if ref.Tag == "" || ref.Digest != "" {
		return
	}
	v := r.Volumes[0]
	if old, err := v.Ref(ref.String()); err == nil && (old.Imported || old.Target.Digest == target.Digest) {
		v.touch(ref.String())
		return
	}
	err := v.PutRef(Ref{Name: ref.String(), Target: target, Checked: time.Now().UTC().Truncate(time.Second), From: ref.Host})
	if err != nil {
		r.debugf("remember %s: %v", ref, err)
	}
}

// choosePlatform returns the manifest of an index that fits a platform best.
func choosePlatform(manifests []ocispec.Descriptor, want ocispec.Platform) (ocispec.Descriptor, error) {
	matcher := platforms.Only(want)
	var fit []ocispec.Descriptor
	var have []string
	for _, m := range manifests {
		if m.Platform == nil || m.Platform.OS == "unknown" || !registry.IsManifest(m.MediaType) && !registry.IsIndex(m.MediaType) {
			continue // attestations, and things that are no images
		}
		have = append(have, platforms.Format(*m.Platform))
		if matcher.Match(*m.Platform) {
			fit = append(fit, m)
		}
	}
	if len(fit) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("no image for platform %s: there are %s", platforms.Format(want), strings.Join(have, ", "))
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case matcher.Less(*a.Platform, *b.Platform):
			return -1
		case matcher.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return fit[0], nil
}

// manifestContent returns a manifest or index from a volume or the registry,
// and keeps it on the volume.
func (r *Images) manifestContent(ctx context.Context, ref registry.Reference, desc ocispec.Descriptor) ([]byte, error) {
	if content, ok := r.fromVolumes(desc); ok {
		return content, nil
	}
	_, content, err := r.Registry.Manifest(ctx, ref.WithDigest(desc.Digest))
	if err != nil {
		return nil, err
	}
	return content, r.Volumes[0].WriteBlob(content)
}

// config is manifestContent for configs.
func (r *Images) config(ctx context.Context, repo registry.Repository, desc ocispec.Descriptor) ([]byte, error) {
	if content, ok := r.fromVolumes(desc); ok {
		return content, nil
	}
	content, err := r.Registry.BlobBytes(ctx, repo, desc, maxConfig)
	if err != nil {
		return nil, err
	}
	return content, r.Volumes[0].WriteBlob(content)
}

func (r *Images) fromVolumes(desc ocispec.Descriptor) ([]byte, bool) {
	for _, v := range r.Volumes {
		content, err := v.ReadBlob(desc, maxConfig)
		if err == nil {
			return content, true
		}
		if !errors.Is(err, fs.ErrNotExist) {
			r.debugf("volume %s: %v", v.Dir(), err)
		}
	}
	return nil, false
}

// OpenBlob returns the blob of a layer from a volume, or else from the
// repository. It is not verified.
func (r *Images) OpenBlob(ctx context.Context, repo registry.Repository, desc ocispec.Descriptor) (io.ReadCloser, error) {
	for _, v := range r.Volumes {
		if f, err := v.OpenBlob(desc); err == nil {
			return f, nil
		}
	}
	return r.Registry.Blob(ctx, repo, desc)
}
