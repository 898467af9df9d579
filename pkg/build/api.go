package build

import (
	"io"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/internal/sandbox"
)

// What Options and Image take from inside this module, for other programs.
type (
	// Registry is a client for any number of registries.
	Registry = registry.Client
	// RegistryOptions say how registries are reached.
	RegistryOptions = registry.Options
	// Reference names an image in a registry.
	Reference = registry.Reference
	// Reporter takes what happens in a build.
	Reporter = progress.Reporter
)

// Init must be called first in main by every program that builds: RUN executes
// the program again as the init process of a sandbox, and in such a process
// Init does not return.
func Init() { sandbox.Init() }

// NewRegistry returns a client. It fails if a certificate cannot be read.
func NewRegistry(opts RegistryOptions) (*Registry, error) { return registry.NewClient(opts) }

// ParseReference reads an image name as command lines have it: "busybox" is
// "docker.io/library/busybox:latest".
func ParseReference(name string) (Reference, error) { return registry.ParseReference(name) }

// ReportTo returns a reporter that writes lines of text to w.
func ReportTo(w io.Writer) *Reporter {
	return progress.New(progress.NewPrinter(w, progress.Text, progress.Info))
}
