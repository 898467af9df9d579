package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/build"
	"github.com/ondol-dev/ondol/pkg/cache"
)

// localScope is the part of a volume's entries that builders without another
// scope share.
const localScope = "default"

// wiring is everything that a build needs, connected.
type wiring struct {
	builder *build.Builder
	push    *registry.Client
	report  *progress.Reporter
	disks   []*cache.Disk
}

// wire connects the parts as the flags say. It is the one place where that is
// done.
func (f *flags) wire(cmd *cobra.Command, destinations []registry.Reference) (_ *wiring, err error) {
	w := &wiring{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	opts := build.Options{}
	if w.report, err = f.log.Reporter(cmd.ErrOrStderr()); err != nil {
		return nil, err
	}
	opts.Report = w.report
	if opts.Registry, err = f.registry.Pull(); err != nil {
		return nil, err
	}
	if w.push, err = f.registry.Push(); err != nil {
		return nil, err
	}
	opts.Push = w.push
	if opts.Compression, err = f.parseCompression(); err != nil {
		return nil, err
	}
	if err := w.openVolumes(f, cmd.Flags().Changed("cache-dir"), &opts); err != nil {
		return nil, err
	}
	// Without a word about it, layers are looked up on the volume only.
	if !cmd.Flags().Changed("cache") || f.cache {
		for _, d := range w.disks {
			opts.Tiers = append(opts.Tiers, cache.VolumeTier(d, localScope))
		}
		opts.Scope = localScope
	}
	if f.cache {
		if err := f.wireRemote(w, &opts, destinations); err != nil {
			return nil, err
		}
	}
	w.builder, err = build.New(opts)
	return w, err
}

func (w *wiring) close() {
	for _, d := range w.disks {
		if err := d.Close(); err != nil {
			w.report.Warnf("%v", err)
		}
	}
}

// openVolumes opens the shared volume, and one of the builder's own if that
// cannot be written to.
func (w *wiring) openVolumes(f *flags, explicit bool, opts *build.Options) error {
	dir := f.cacheDir
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) && !explicit {
		dir = "" // the default is only a place to look
	}
	if dir != "" {
		d, err := cache.OpenDisk(dir)
		if err != nil {
			return err
		}
		w.disks = append(w.disks, d)
		if !d.ReadOnly() {
			opts.Volume = d
			return nil
		}
		opts.Shared = append(opts.Shared, d)
	}
	own, err := f.ownDir()
	if err != nil {
		return err
	}
	d, err := cache.OpenDisk(own)
	if err != nil {
		return err
	}
	w.disks = append([]*cache.Disk{d}, w.disks...)
	opts.Volume = d
	return nil
}

// ownDir is the directory of the builder's own volume.
func (f *flags) ownDir() (string, error) {
	if f.workDir != "" {
		return filepath.Join(f.workDir, "volume"), nil
	}
	if fi, err := os.Stat("/kaniko"); err == nil && fi.IsDir() {
		return "/kaniko/volume", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no directory to work in: set --cache-dir or --kaniko-dir: %w", err)
	}
	return filepath.Join(dir, "ondol"), nil
}

// wireRemote connects the cache in a registry or an OCI layout.
func (f *flags) wireRemote(w *wiring, opts *build.Options, destinations []registry.Reference) error {
	name := f.cacheRepo
	if name == "" {
		if len(destinations) == 0 {
			return errors.New("--cache=true needs a --cache-repo if there is no --destination to derive it from")
		}
		name = destinations[0].Repository.String() + "/cache"
	}
	var store cache.RemoteStore
	tier := &cache.Tier{Name: name}
	if dir, ok := strings.CutPrefix(name, "oci:"); ok {
		layout, err := registry.CreateLayout(dir)
		if err != nil {
			return fmt.Errorf("--cache-repo: %w", err)
		}
		store = cache.LayoutStore(layout)
	} else {
		repo, err := registry.ParseRepository(name)
		if err != nil {
			return fmt.Errorf("--cache-repo: %w", err)
		}
		store = cache.RegistryStore(w.push, repo)
		tier.Repository = &repo
		opts.RemoteRepository = &repo
	}
	remote := cache.NewRemote(store, cache.RemoteOptions{Shard: f.shard(), TTL: f.cacheTTL})
	tier.Table, tier.Open = remote, store.Blob
	opts.Tiers = append(opts.Tiers, tier)
	if !f.noPushCache {
		opts.Remote = remote
	}
	return nil
}

// shard tells the tables of different builds in one repository apart.
func (f *flags) shard() string {
	return strings.Join([]string{filepath.Base(f.dockerfile), f.target, f.platform}, "\x00")
}

// summary prints what has become of the build.
func (w *wiring) summary(img *build.Image) {
	cached := 0
	for _, s := range img.Steps {
		if s.Cached {
			cached++
		}
	}
	unneeded := ""
	if img.Unneeded > 0 {
		unneeded = fmt.Sprintf(", %d more behind them not needed", img.Unneeded)
	}
	w.report.Infof("%d of %d steps from the cache%s", cached, len(img.Steps), unneeded)
	w.report.Infof("image %s", img.Descriptor.Digest)
}
