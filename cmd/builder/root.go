package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/internal/cli"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/build"
)

// newCommand returns the root command, which builds.
func newCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "builder --context DIR --destination IMAGE",
		Short: "Build a container image from a Dockerfile",
		Long: `builder builds a container image from a Dockerfile, without a daemon, and pushes
it. Commands run in a root file system of their own; the one that builder itself
runs in is never touched.

The exit code is that of the command if a RUN fails, and 1 for other failures.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runBuild(cmd, &f) },
	}
	f.register(cmd)
	cmd.AddCommand(&cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), cli.Version) },
	})
	return cmd
}

// runBuild builds and exports as the flags say.
func runBuild(cmd *cobra.Command, f *flags) error {
	ctx := cmd.Context()
	if err := checkLater(cmd); err != nil {
		return err
	}
	destinations, err := f.parseDestinations()
	if err != nil {
		return err
	}
	if len(destinations) == 0 && !f.noPush {
		return errors.New("where to? give a --destination, or --no-push")
	}
	req, err := f.request()
	if err != nil {
		return err
	}
	w, err := f.wire(cmd, destinations)
	if err != nil {
		return err
	}
	defer w.close()
	if !f.noPush && !f.skipPushCheck {
		if err := w.checkPush(ctx, destinations); err != nil {
			return err
		}
	}
	req.Export = func(ctx context.Context, img *build.Image) error { return f.export(ctx, img, destinations) }
	img, err := w.builder.Build(ctx, *req)
	if err != nil {
		return err
	}
	if err := f.writeDigests(img, destinations); err != nil {
		return err
	}
	w.summary(img)
	return nil
}

// request makes the build's request of the flags.
func (f *flags) request() (*build.Request, error) {
	dir, err := f.contextDir()
	if err != nil {
		return nil, err
	}
	req := &build.Request{Context: dir, Target: f.target}
	if req.Dockerfile, req.Content, err = build.ReadDockerfile(f.dockerfile, dir); err != nil {
		return nil, err
	}
	req.BuildArgs, err = keyValues("build-arg", f.buildArgs, func(name string) (string, error) { return os.Getenv(name), nil })
	if err != nil {
		return nil, err
	}
	req.Labels, err = keyValues("label", f.labels, func(name string) (string, error) {
		return "", fmt.Errorf("--label %q: must be NAME=VALUE", name)
	})
	if err != nil {
		return nil, err
	}
	req.Platform, err = f.parsePlatform()
	return req, err
}

// checkPush finds out whether the image can be pushed, before any work is
// done for it.
func (w *wiring) checkPush(ctx context.Context, destinations []registry.Reference) error {
	group, ctx := errgroup.WithContext(ctx)
	done := map[registry.Repository]bool{}
	for _, d := range destinations {
		if done[d.Repository] {
			continue
		}
		done[d.Repository] = true
		group.Go(func() error {
			if err := w.push.CheckPush(ctx, d.Repository); err != nil {
				return fmt.Errorf("may the image be pushed? %w", err)
			}
			return nil
		})
	}
	return group.Wait()
}

// export brings the image where the flags say.
func (f *flags) export(ctx context.Context, img *build.Image, destinations []registry.Reference) error {
	if f.layoutPath != "" {
		if err := img.WriteLayout(ctx, f.layoutPath, destinations...); err != nil {
			return err
		}
	}
	if f.tarPath != "" {
		if err := f.writeTar(ctx, img, destinations); err != nil {
			return err
		}
	}
	if !f.noPush {
		return img.Push(ctx, destinations...)
	}
	return nil
}

// writeDigests writes down what the image has become, where the flags say.
func (f *flags) writeDigests(img *build.Image, destinations []registry.Reference) error {
	var names, tags []string
	for _, d := range destinations {
		names = append(names, d.Repository.String()+"@"+img.Descriptor.Digest.String())
		tags = append(tags, d.String()+"@"+img.Descriptor.Digest.String())
	}
	for _, file := range []struct {
		path    string
		content string
	}{
		{f.digestFile, img.Descriptor.Digest.String()},
		{f.nameDigestFile, lines(names)},
		{f.tagDigestFile, lines(tags)},
	} {
		if file.path == "" {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(file.path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file.path, []byte(file.content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func lines(l []string) string {
	if len(l) == 0 {
		return ""
	}
	return strings.Join(l, "\n") + "\n"
}

// writeTar writes the image to a file that appears when it is complete.
func (f *flags) writeTar(ctx context.Context, img *build.Image, names []registry.Reference) error {
	file, err := os.CreateTemp(filepath.Dir(f.tarPath), ".image-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := img.WriteArchive(ctx, file, names...); err != nil {
		return fmt.Errorf("write %s: %w", f.tarPath, err)
	}
	if err := file.Chmod(0o644); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("write %s: %w", f.tarPath, err)
	}
	return os.Rename(file.Name(), f.tarPath)
}
