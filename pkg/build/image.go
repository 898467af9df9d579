package build

import (
	"context"
	"encoding/json"
	"time"

	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
)

// Image is what a build has come to.
type Image struct {
	// Descriptor describes the manifest, and Manifest is its content.
	Descriptor ocispec.Descriptor
	Manifest   []byte
	// Config is the content of the image's config.
	Config []byte
	// Steps say what became of the steps, in the order in which they ended.
	Steps []StepRecord
	// Unneeded counts the steps of the target that were neither run nor looked
	// at, because what they lead to was in the cache.
	Unneeded int

	config ocispec.Descriptor
	layers []*layer
	solver *solver
}

// assemble puts together the image of the target. It waits for the blobs of
// all its layers.
func (s *solver) assemble(ctx context.Context, layers []*layer) (*Image, error) {
	st := s.plan.target.state.clone()
	cfg := st.config
	if len(s.plan.req.Labels) > 0 {
		if cfg.Config.Labels == nil {
			cfg.Config.Labels = map[string]string{}
		}
		for k, v := range s.plan.req.Labels {
			cfg.Config.Labels[k] = v
		}
	}
	s.plan.targets.apply(&cfg)
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	cfg.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	for _, l := range layers {
		b, err := l.blob.wait(ctx)
		if err != nil {
			return nil, err
		}
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, b.DiffID)
		manifest.Layers = append(manifest.Layers, ocispec.Descriptor{MediaType: ociLayerType(b.MediaType), Digest: b.Digest, Size: b.Size, URLs: b.URLs})
	}
	var err error
	cfg.History, err = s.history(ctx, st.history, layers)
	if err != nil {
		return nil, err
	}
	if cfg.Created == nil {
		for _, h := range cfg.History {
			if h.Created != nil {
				cfg.Created = h.Created
			}
		}
	}
	config, err := canonicalConfig(&cfg)
	if err != nil {
		return nil, err
	}
	manifest.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	content, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return nil, err
	}
	img := &Image{
		Descriptor: ocispec.Descriptor{MediaType: manifest.MediaType, Digest: digest.FromBytes(content), Size: int64(len(content))},
		Manifest:   content, Config: config, config: manifest.Config, layers: layers, solver: s,
	}
	s.note(func() { img.Steps = append(img.Steps, s.records...) })
	img.Unneeded = s.steps - len(img.Steps)
	return img, nil
}

// apply writes the platform that was asked for into the config. Without one,
// the image is for what its base is for.
func (t targets) apply(cfg *dockerspec.DockerOCIImage) {
	if !t.implicit {
		same := t.image.OS == cfg.OS && t.image.Architecture == cfg.Architecture
		cfg.OS, cfg.Architecture = t.image.OS, t.image.Architecture
		if t.image.Variant != "" || !same {
			cfg.Variant = t.image.Variant
		}
		if t.image.OSVersion != "" || !same {
			cfg.OSVersion = t.image.OSVersion
		}
		if t.image.OSFeatures != nil {
			cfg.OSFeatures = t.image.OSFeatures
		}
	}
	cfg.Platform = platforms.Normalize(cfg.Platform)
}

// canonicalConfig is the config as JSON with the keys in order, in the form in
// which BuildKit writes it.
func canonicalConfig(cfg *dockerspec.DockerOCIImage) ([]byte, error) {
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	if _, ok := m["created"]; !ok {
		m["created"] = json.RawMessage("null")
	}
	if cfg.History == nil {
		m["history"] = json.RawMessage("null")
	}
	return json.Marshal(m)
}

// history dates the entries: those of a step by their layer, and others by the
// first new layer, or the layer before them. The result has an entry for every
// layer.
func (s *solver) history(_ context.Context, entries []historyEntry, layers []*layer) ([]ocispec.History, error) {
	out := make([]ocispec.History, len(entries))
	for i, h := range entries {
		out[i] = h.History
	}
	out = s.matchLayers(out, layers)
	n := 0
	for i := range out {
		if out[i].EmptyLayer {
			continue
		}
		if out[i].Created == nil && n < len(layers) && !layers[n].created.IsZero() {
			t := layers[n].created
			out[i].Created = &t
		}
		n++
	}
	// What has no time yet: the first time after the first entry without one,
	// or else the last one at all; and then always that of the entry before.
	var created *time.Time
	missing := false
	for _, h := range out {
		if h.Created == nil {
			missing = true
			continue
		}
		created = h.Created
		if missing {
			break
		}
	}
	missing = false
	for i := range out {
		if out[i].Created == nil {
			missing = true
			out[i].Created = created
		} else if missing {
			created = out[i].Created
		}
	}
	return out, nil
}

// matchLayers makes the number of entries with a layer that of the layers:
// base images have been seen whose history says too much or too little.
func (s *solver) matchLayers(history []ocispec.History, layers []*layer) []ocispec.History {
	withLayer := 0
	for i := range history {
		if history[i].EmptyLayer {
			continue
		}
		if withLayer == len(layers) {
			history[i].EmptyLayer = true
			continue
		}
		withLayer++
	}
	for ; withLayer < len(layers); withLayer++ {
		h := ocispec.History{Comment: "buildkit.exporter.image.v0"}
		if t := layers[withLayer].created; !t.IsZero() {
			h.Created = &t
		}
		history = append(history, h)
	}
	return history
}

// ociLayerType is the OCI's name for a layer's media type.
func ociLayerType(t string) string {
	switch t {
	case registry.MediaTypeDockerLayer:
		return ocispec.MediaTypeImageLayerGzip
	case "application/vnd.docker.image.rootfs.diff.tar":
		return ocispec.MediaTypeImageLayer
	case "application/vnd.docker.image.rootfs.diff.tar.zstd":
		return ocispec.MediaTypeImageLayerZstd
	case "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		//lint:ignore SA1019 old images have such layers
		return ocispec.MediaTypeImageLayerNonDistributableGzip
	}
	return t
}
