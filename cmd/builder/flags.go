package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/ondol-dev/ondol/internal/cli"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// flags are the command line. Names and meaning are Kaniko's, so that its
// users need not change anything.
type flags struct {
	log      cli.LogFlags
	registry cli.RegistryFlags

	context, contextSubPath, dockerfile string
	destinations                        []string
	buildArgs, labels                   []string
	target, platform                    string

	cache             bool
	cacheRepo         string
	cacheDir, workDir string
	cacheTTL          time.Duration
	noPushCache       bool

	noPush                                    bool
	skipPushCheck                             bool
	tarPath, layoutPath                       string
	digestFile, nameDigestFile, tagDigestFile string
	compression                               string
	compressionLevel                          int
}

func (f *flags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVarP(&f.context, "context", "c", "/workspace/", "the directory with the files to build from: DIR or dir://DIR")
	fs.StringVar(&f.contextSubPath, "context-sub-path", "", "a directory within the context to use instead of it")
	fs.StringVarP(&f.dockerfile, "dockerfile", "f", "Dockerfile", "the Dockerfile, relative to the working directory or to the context")
	fs.StringArrayVarP(&f.destinations, "destination", "d", nil, "the name to push the image under (can be repeated)")
	fs.StringArrayVar(&f.buildArgs, "build-arg", nil, "the value of an ARG: NAME=VALUE, or NAME for that of the environment (can be repeated)")
	fs.StringVar(&f.target, "target", "", "the stage to build (default the last one)")
	fs.StringVar(&f.platform, "platform", "", "what the image is for: OS/ARCH[/VARIANT] (default that of the base image)")
	fs.StringArrayVar(&f.labels, "label", nil, "a label for the image: NAME=VALUE (can be repeated)")

	fs.BoolVar(&f.cache, "cache", false, "use the cache in a registry; the one on the volume is used unless this is false")
	fs.StringVar(&f.cacheRepo, "cache-repo", "", "where the cache is: a repository, or oci:DIR (default the first destination with /cache)")
	fs.StringVar(&f.cacheDir, "cache-dir", "/cache", "the volume with base images and layers, shared with the warmer and other builders")
	fs.DurationVar(&f.cacheTTL, "cache-ttl", 14*24*time.Hour, "how long a cache entry stays that no build uses")
	fs.BoolVar(&f.noPushCache, "no-push-cache", false, "do not write to the cache in the registry")
	fs.StringVar(&f.workDir, "kaniko-dir", os.Getenv("KANIKO_DIR"), "the directory to work in if the volume cannot be written to")

	fs.BoolVar(&f.noPush, "no-push", false, "do not push the image")
	fs.BoolVar(&f.skipPushCheck, "skip-push-permission-check", false, "do not find out before building whether the image may be pushed")
	fs.StringVar(&f.tarPath, "tar-path", "", "a file to write the image to, for docker load")
	fs.StringVar(&f.layoutPath, "oci-layout-path", "", "a directory to write the image to, as an OCI layout")
	fs.StringVar(&f.digestFile, "digest-file", "", "a file to write the image's digest to")
	fs.StringVar(&f.nameDigestFile, "image-name-with-digest-file", "", "a file to write the destinations to, each with the digest")
	fs.StringVar(&f.tagDigestFile, "image-name-tag-with-digest-file", "", "a file to write the destinations to, each with tag and digest")
	fs.StringVar(&f.compression, "compression", "", "how new layers are compressed: gzip or zstd (default gzip)")
	fs.IntVar(&f.compressionLevel, "compression-level", -1, "how hard, on the scale of the kind of compression")

	f.registry.RegisterPush(fs)
	f.registry.RegisterPull(fs)
	f.log.Register(fs)
	f.registerIgnored(cmd)
}

// later are flags of Kaniko that mean something here too, which is still to be
// done. They are refused and not ignored.
var later = [...]string{
	"annotation", "bucket", "credential-helpers", "git", "image-format", "ignore-path", "materialize", "dryrun",
	"push-ignore-immutable-tag-errors", "registry-map", "registry-mirror", "reproducible", "secret", "single-snapshot",
	"skip-default-registry-fallback",
}

// checkLater refuses what is not supported yet. Switching something off that
// is not there is no reason to.
func checkLater(cmd *cobra.Command) error {
	for _, name := range later {
		if fl := cmd.Flags().Lookup(name); fl.Changed && fl.Value.String() != "[false]" {
			return fmt.Errorf("--%s is not supported yet", name)
		}
	}
	return nil
}

// registerIgnored adds the flags of Kaniko that have no meaning here, because
// what they steer is not done or always done.
func (f *flags) registerIgnored(cmd *cobra.Command) {
	fs := cmd.Flags()
	for _, name := range []string{
		"force", "cleanup", "pre-cleanup", "preserve-context", "skip-unused-stages", "force-build-metadata",
		"use-new-run", "compressed-caching", "cache-copy-layers", "cache-run-layers", "ignore-var-run", "whitelist-var-run",
	} {
		fs.Bool(name, false, "accepted and ignored")
		fs.Lookup(name).Hidden = true
	}
	for _, name := range []string{"snapshot-mode", "snapshotMode", "image-fs-extract-retry"} {
		fs.String(name, "", "accepted and ignored")
		fs.Lookup(name).Hidden = true
	}
	for _, name := range later {
		fs.StringArray(name, nil, "not supported yet")
		fs.Lookup(name).NoOptDefVal = "true"
		fs.Lookup(name).Hidden = true
	}
	// Old spellings.
	fs.StringVar(&f.platform, "custom-platform", "", "")
	fs.StringVar(&f.platform, "customPlatform", "", "")
	fs.StringVar(&f.tarPath, "tarPath", "", "")
	for _, name := range []string{"custom-platform", "customPlatform", "tarPath"} {
		fs.Lookup(name).Hidden = true
	}
}

// keyValues reads NAME=VALUE arguments. A name alone gets what fallback says.
func keyValues(flag string, args []string, fallback func(string) (string, error)) (map[string]string, error) {
	m := map[string]string{}
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		if k == "" {
			return nil, fmt.Errorf("--%s %q: must be NAME=VALUE", flag, a)
		}
		if !ok {
			var err error
			if v, err = fallback(k); err != nil {
				return nil, err
			}
		}
		m[k] = v
	}
	return m, nil
}

// contextDir is the build context's directory.
func (f *flags) contextDir() (string, error) {
	dir := f.context
	if scheme, rest, ok := strings.Cut(dir, "://"); ok {
		if scheme != "dir" {
			return "", fmt.Errorf("--context %s: build contexts of kind %s:// are not supported yet: use a directory", f.context, scheme)
		}
		dir = rest
	}
	if f.contextSubPath != "" {
		dir += "/" + f.contextSubPath
	}
	return dir, nil
}

func (f *flags) parsePlatform() (*ocispec.Platform, error) {
	if f.platform == "" {
		return nil, nil
	}
	p, err := platforms.Parse(f.platform)
	if err != nil {
		return nil, fmt.Errorf("--platform %s: %w", f.platform, err)
	}
	return &p, nil
}

func (f *flags) parseDestinations() ([]registry.Reference, error) {
	var out []registry.Reference
	for _, d := range f.destinations {
		ref, err := registry.ParseReference(d)
		if err != nil {
			return nil, fmt.Errorf("--destination: %w", err)
		}
		if ref.Digest != "" {
			return nil, fmt.Errorf("--destination %s: must have no digest", d)
		}
		out = append(out, ref)
	}
	return out, nil
}

func (f *flags) parseCompression() (snapshot.Compression, error) {
	c := snapshot.Compression{Kind: f.compression, Level: max(f.compressionLevel, 0)}
	switch c.Kind {
	case "", "gzip", "zstd":
		return c, nil
	}
	return c, fmt.Errorf("--compression %s: must be gzip or zstd", f.compression)
}
