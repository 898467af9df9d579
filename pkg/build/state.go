package build

import (
	"maps"
	"slices"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/util/system"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// state is what a stage has come to at some point: the image's config so far,
// the variables, and the file system. Stages that start from another one get a
// copy.
type state struct {
	config  dockerspec.DockerOCIImage
	history []historyEntry
	env     *environment                        // what expressions and commands see
	args    []instructions.KeyValuePairOptional // declared so far
	files   *fileSystem                         // nil is empty
	cmdSet  bool                                // CMD has come in this stage
	base    *dockerspec.DockerOCIImage          // the base image's config as it was
}

// historyEntry is an entry of the image's history. If it belongs to a step, it
// is dated when that has been solved.
type historyEntry struct {
	ocispec.History
	step *step
}

// historyComment marks the entries as those of a Dockerfile. It is BuildKit's,
// so that tools which read histories understand ours.
const historyComment = "buildkit.dockerfile.v0"

// fileSystem is what a stage's files are at some point: the layers of a base
// image, or of a step, on top of others. It is made by dispatching and never
// changes; what it amounts to is found out by solving.
type fileSystem struct {
	below *fileSystem
	base  *baseImage // either this
	step  *step      // or this

	solved call[[]*layer]
}

// steps returns the steps of the file system, the first one first.
func (f *fileSystem) steps() []*step {
	var out []*step
	for ; f != nil; f = f.below {
		if f.step != nil {
			out = append(out, f.step)
		}
	}
	slices.Reverse(out)
	return out
}

// newState returns what a stage starts with.
func (p *plan) newState(st *stage) *state {
	switch {
	case st.from != nil:
		s := st.from.state.clone()
		s.config.Config.OnBuild = nil
		return s
	case st.image != nil:
		return stateOfImage(st.image)
	}
	s := &state{config: emptyImage(p.targets.image), env: &environment{}}
	return s
}

func stateOfImage(img *baseImage) *state {
	s := &state{config: img.config, env: &environment{}}
	s = s.clone() // the image's own config is shared between stages
	base := img.config
	s.base = &base
	s.config.Created = nil
	s.config.Config.OnBuild = nil
	s.config.History = nil
	for _, h := range img.config.History {
		s.history = append(s.history, historyEntry{History: h})
	}
	if len(img.Layers) > 0 {
		s.files = &fileSystem{base: img}
	}
	return s
}

func (s *state) clone() *state {
	c := *s
	cfg := &c.config.Config
	cfg.Env = slices.Clone(cfg.Env)
	cfg.Cmd = slices.Clone(cfg.Cmd)
	cfg.Entrypoint = slices.Clone(cfg.Entrypoint)
	cfg.OnBuild = slices.Clone(cfg.OnBuild)
	cfg.ExposedPorts = maps.Clone(cfg.ExposedPorts)
	cfg.Volumes = maps.Clone(cfg.Volumes)
	cfg.Labels = maps.Clone(cfg.Labels)
	cfg.Shell = slices.Clone(cfg.Shell)
	if cfg.Healthcheck != nil {
		h := *cfg.Healthcheck
		h.Test = slices.Clone(h.Test)
		cfg.Healthcheck = &h
	}
	c.history = slices.Clone(s.history)
	c.args = slices.Clone(s.args)
	c.env = s.env.clone()
	return &c
}

// emptyImage is the config that FROM scratch starts with.
func emptyImage(p ocispec.Platform) dockerspec.DockerOCIImage {
	var img dockerspec.DockerOCIImage
	img.Platform = platforms.Normalize(p)
	img.RootFS.Type = "layers"
	img.Config.WorkingDir = "/"
	img.Config.Env = []string{"PATH=" + system.DefaultPathEnvUnix}
	return img
}

// platform is what the stage's commands are for.
func (s *state) platform() ocispec.Platform {
	return platforms.Normalize(ocispec.Platform{
		OS: s.config.OS, Architecture: s.config.Architecture, Variant: s.config.Variant,
		OSVersion: s.config.OSVersion, OSFeatures: s.config.OSFeatures,
	})
}
