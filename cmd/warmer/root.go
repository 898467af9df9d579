package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/ondol-dev/ondol/internal/cli"
	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/pkg/build"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/warm"
)

// flags are the command line. Names, short ones too, are those of Kaniko's
// warmer.
type flags struct {
	log      cli.LogFlags
	registry cli.RegistryFlags

	images     []string
	dockerfile string
	buildArgs  []string
	cacheDir   string
	platform   string
	parallel   int
}

// newCommand returns the root command, which pulls.
func newCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "warmer --image IMAGE --cache-dir DIR",
		Short: "Bring images onto the volume that builders share",
		Long: `warmer pulls images, verifies them and unpacks their layers on a volume. A build
on the node then needs nothing from the registry but the answer to what a tag
leads to. What is there already is not pulled again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.pull(cmd) },
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringArrayVarP(&f.images, "image", "i", nil, "an image to warm (can be repeated)")
	fs.StringVarP(&f.dockerfile, "dockerfile", "d", "", "a Dockerfile of which all images are warmed")
	fs.StringArrayVar(&f.buildArgs, "build-arg", nil, "the value of an ARG that the Dockerfile's FROMs use: NAME=VALUE (can be repeated)")
	fs.IntVar(&f.parallel, "parallel", 3, "how many images, and layers of each, are pulled at the same time")
	f.registry.RegisterPull(fs)

	all := cmd.PersistentFlags()
	all.StringVarP(&f.cacheDir, "cache-dir", "c", "/cache", "the volume")
	all.StringVar(&f.platform, "platform", "", "which of an image's platforms: OS/ARCH[/VARIANT] (default that of this machine)")
	all.StringVar(&f.platform, "customPlatform", "", "")
	all.Lookup("customPlatform").Hidden = true
	f.log.Register(all)
	// What is there is verified by its digest, so that there is nothing to
	// force, and does not become wrong with time.
	fs.BoolP("force", "f", false, "accepted and ignored")
	fs.Duration("cache-ttl", 0, "accepted and ignored")
	for _, name := range []string{"force", "cache-ttl"} {
		fs.Lookup(name).Hidden = true
	}
	cmd.AddCommand(f.importCommand(), f.listCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), cli.Version) },
	})
	return cmd
}

// open opens the volume and makes a warmer for it.
func (f *flags) open(cmd *cobra.Command) (*cache.Disk, *warm.Warmer, *progress.Reporter, error) {
	report, err := f.log.Reporter(cmd.ErrOrStderr())
	if err != nil {
		return nil, nil, nil, err
	}
	platform, err := f.parsePlatform()
	if err != nil {
		return nil, nil, nil, err
	}
	client, err := f.registry.Pull()
	if err != nil {
		return nil, nil, nil, err
	}
	v, err := cache.OpenDisk(f.cacheDir)
	if err != nil {
		return nil, nil, nil, err
	}
	w, err := warm.New(warm.Options{Volume: v, Registry: client, Platform: platform, Parallelism: f.parallel, Report: report})
	if err != nil {
		v.Close()
		return nil, nil, nil, err
	}
	return v, w, report, nil
}

func (f *flags) parsePlatform() (ocispec.Platform, error) {
	p, err := warm.Platform(f.platform)
	if err != nil {
		return p, fmt.Errorf("--platform %s: %w", f.platform, err)
	}
	return p, nil
}

func (f *flags) pull(cmd *cobra.Command) error {
	names, err := f.names()
	if err != nil {
		return err
	}
	v, w, report, err := f.open(cmd)
	if err != nil {
		return err
	}
	defer v.Close()
	_, err = w.Pull(cmd.Context(), names)
	if _, err2 := warm.UpdateCatalog(v, report.Debugf); err2 != nil {
		report.Warnf("%v", err2)
	}
	return err
}

// names are the images that the flags ask for.
func (f *flags) names() ([]string, error) {
	names := f.images
	if f.dockerfile != "" {
		path, content, err := build.ReadDockerfile(f.dockerfile, ".")
		if err != nil {
			return nil, err
		}
		args := map[string]string{}
		for _, a := range f.buildArgs {
			k, v, ok := strings.Cut(a, "=")
			if !ok {
				v = os.Getenv(k)
			}
			args[k] = v
		}
		platform, err := f.parsePlatform()
		if err != nil {
			return nil, err
		}
		more, err := build.BaseImages(path, content, args, &platform)
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
	}
	names = warm.Names(names)
	if len(names) == 0 {
		return nil, errors.New("warm what? give an --image or a --dockerfile")
	}
	return names, nil
}

func (f *flags) importCommand() *cobra.Command {
	var inner string
	cmd := &cobra.Command{
		Use:   "import FILE NAME",
		Short: "Bring an image from a file onto the volume",
		Long: `import takes an image from a file: an OCI layout (a directory, or a tar of one), a
tar of docker save, or a tar of a root file system. From then on, builders on
the volume take NAME to mean this image, and ask no registry for it.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, w, report, err := f.open(cmd)
			if err != nil {
				return err
			}
			defer v.Close()
			img, err := w.Import(cmd.Context(), args[0], inner, args[1])
			if err != nil {
				return err
			}
			report.Infof("%s is %s", img.Ref.Familiar(), img.Target.Digest)
			if _, err := warm.UpdateCatalog(v, report.Debugf); err != nil {
				report.Warnf("%v", err)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&inner, "image", "", "which image, if the file has several: its tag or name there")
	return cmd
}

func (f *flags) listCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List the images on the volume", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := f.log.Reporter(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			v, err := cache.OpenDisk(f.cacheDir)
			if err != nil {
				return err
			}
			defer v.Close()
			records, err := warm.UpdateCatalog(v, report.Debugf)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "IMAGE\tDIGEST\tLAYERS\tUNPACKED\tSIZE\tLAST USE\tFROM")
			for _, r := range records {
				fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\n", r.Name, r.Digest.Encoded()[:12], r.Layers, r.Unpacked, megabytes(r.Size), ago(r.LastUse), r.From)
			}
			return w.Flush()
		},
	}
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// ago says how long ago something was, in the largest unit that fits.
func ago(t time.Time) string {
	d := time.Since(t)
	switch {
	case t.IsZero():
		return "never"
	case d < time.Minute:
		return "now"
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}
