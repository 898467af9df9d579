package warm

import (
	"encoding/json"
	"errors"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/cache/catalog"
)

// Records returns what the volume's files say of its images, sorted by name:
// for each platform that is there, the sizes are added up.
func Records(v *cache.Disk) ([]catalog.Record, error) {
	refs, err := v.Refs()
	if err != nil {
		return nil, err
	}
	var out []catalog.Record
	for _, ref := range refs {
		r := catalog.Record{Name: ref.Name, Digest: ref.Target.Digest, From: ref.From, Warmed: ref.Checked, LastUse: v.LastUse(ref.Name)}
		for _, l := range layersOf(v, ref.Target, 0) {
			r.Layers++
			if v.HasBlob(l.Descriptor) {
				r.Size += l.Size
			}
			if v.HasTree(l.DiffID) {
				r.Unpacked++
			}
		}
		out = append(out, r)
	}
	return out, nil
}

// layersOf returns the layers of all images below a manifest or index that the
// volume has the manifest and config of.
func layersOf(v *cache.Disk, desc ocispec.Descriptor, depth int) []cache.Layer {
	content, err := v.ReadBlob(desc, maxManifest)
	if err != nil || depth > 4 {
		return nil
	}
	var m struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if json.Unmarshal(content, &m) != nil {
		return nil
	}
	var out []cache.Layer
	for _, child := range m.Manifests {
		out = append(out, layersOf(v, child, depth+1)...)
	}
	config, err := v.ReadBlob(m.Config, maxManifest)
	if err != nil {
		return out
	}
	var img ocispec.Image
	if json.Unmarshal(config, &img) != nil || len(img.RootFS.DiffIDs) != len(m.Layers) {
		return out
	}
	for i, l := range m.Layers {
		out = append(out, cache.Layer{Descriptor: l, DiffID: img.RootFS.DiffIDs[i]})
	}
	return out
}

// UpdateCatalog brings the volume's catalog up to date, and returns what it
// has. Where there can be no catalog, it returns what the files say: the same,
// but for what only a catalog remembers.
func UpdateCatalog(v *cache.Disk, logf func(string, ...any)) ([]catalog.Record, error) {
	files, err := Records(v)
	if err != nil || v.ReadOnly() {
		return files, err
	}
	c, err := catalog.Open(v.Dir(), logf)
	if errors.Is(err, catalog.ErrUnavailable) {
		logf("%v", err)
		return files, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Reconcile(files); err != nil {
		logf("catalog: %v", err)
		return files, nil
	}
	return c.All()
}

// Platform reads a platform as the command line has it; "" is this machine's.
func Platform(s string) (ocispec.Platform, error) {
	if s == "" {
		p := platforms.DefaultSpec()
		p.OSVersion, p.OSFeatures = "", nil
		return p, nil
	}
	p, err := platforms.Parse(s)
	return platforms.Normalize(p), err
}
