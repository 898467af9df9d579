package build

import (
	"context"
	"errors"
	"runtime"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/internal/sandbox"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// Options say how to build. Volume is required; for all else the zero value
// works.
type Options struct {
	// Volume holds base images, layers and whatever is made on the way. It
	// must be writable. It is the caller's to close.
	Volume *cache.Disk
	// Shared are further volumes, such as one that a warmer fills and that can
	// only be read. What they have is not fetched again.
	Shared []*cache.Disk
	// Registry is where images come from that no volume has. nil is a client
	// without options.
	Registry *registry.Client
	// Push is how images are pushed; nil is Registry.
	Push *registry.Client
	// Tiers are where the outcome of steps is looked up, the nearest first.
	Tiers cache.Tiered
	// Scope is that part of the volume's entries to which the outcome of steps
	// is added; "" adds none.
	Scope string
	// Remote takes the outcome of steps too, with their layers; nil for none.
	Remote *cache.Remote
	// RemoteRepository is where Remote keeps layers, if that is a registry.
	RemoteRepository *registry.Repository
	// Compression is for new layers.
	Compression snapshot.Compression
	// Parallelism bounds how many layers are written at the same time, and how
	// many are sent or fetched; 0 is one for each core and four for each core.
	Parallelism int
	// Report takes what happens; nil discards it.
	Report *progress.Reporter
	// Run runs a command; nil is sandbox.Run.
	Run func(context.Context, *sandbox.Spec) error
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

func (o Options) withDefaults() (Options, error) {
	if o.Volume == nil {
		return o, errors.New("build: no volume given")
	}
	if o.Volume.ReadOnly() {
		return o, errors.New("build: the volume " + o.Volume.Dir() + " is read-only, and a build needs one to work in")
	}
	if o.Registry == nil {
		client, err := registry.NewClient(registry.Options{})
		if err != nil {
			return o, err
		}
		o.Registry = client
	}
	if o.Push == nil {
		o.Push = o.Registry
	}
	if o.Parallelism <= 0 {
		o.Parallelism = runtime.GOMAXPROCS(0)
	}
	if o.Report == nil {
		o.Report = progress.New(nil)
	}
	if o.Run == nil {
		o.Run = sandbox.Run
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o, nil
}

// A Request says what to build.
type Request struct {
	// Context is the directory that COPY and ADD take files from.
	Context string
	// Dockerfile is the path of the Dockerfile, for messages and to find the
	// ignore file beside it. Content is what is in it.
	Dockerfile string
	Content    []byte
	// Target is the stage to build; "" is the last one.
	Target string
	// BuildArgs are the values of ARGs by name.
	BuildArgs map[string]string
	// Labels are added to the image's own.
	Labels map[string]string
	// Platform is what the image is for; nil is the platform of this machine,
	// or that of the base image.
	Platform *ocispec.Platform
	// Export brings the image where it is wanted; nil does nothing. It is part
	// of the build, since only then it turns out whether all that the caches
	// say they have is really there: if not, the build starts again without
	// that, and Export is called again.
	Export func(context.Context, *Image) error
}

// A Builder builds images. It can be used for any number of builds, also at
// the same time.
type Builder struct{ opts Options }

// New returns a builder.
func New(opts Options) (*Builder, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Builder{opts}, nil
}
