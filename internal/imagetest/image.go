package imagetest

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Push pushes an image with these layers, given as plain tars, and a config
// for this machine's platform, which edit may change.
func (r *Registry) Push(t testing.TB, ref string, edit func(*v1.ConfigFile), layers ...[]byte) v1.Image {
	t.Helper()
	img := Image(t, edit, layers...)
	if err := remote.Write(r.tag(t, ref), img); err != nil {
		t.Fatal(err)
	}
	return img
}

func (r *Registry) tag(t testing.TB, ref string) name.Reference {
	t.Helper()
	n, err := name.ParseReference(r.Host+"/"+ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Image makes an image of plain tars.
func Image(t testing.TB, edit func(*v1.ConfigFile), layers ...[]byte) v1.Image {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil }, tarball.WithMediaType(types.OCILayer))
		must(err)
		img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: Epoch}, CreatedBy: "base"}})
		must(err)
	}
	cfg, err := img.ConfigFile()
	must(err)
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Created = v1.Time{Time: Epoch}
	cfg.Config.Env = []string{"PATH=/bin"}
	if edit != nil {
		edit(cfg)
	}
	img, err = mutate.ConfigFile(img, cfg)
	must(err)
	return img
}

// A Pulled is an image that was read back from a registry, verified.
type Pulled struct {
	Digest   string
	Manifest *v1.Manifest
	Config   *v1.ConfigFile
	Layers   [][]byte // plain tars
}

// Pull reads an image back.
func (r *Registry) Pull(t testing.TB, ref string) *Pulled {
	t.Helper()
	img, err := remote.Image(r.tag(t, ref), remote.WithAuth(authn.Anonymous))
	if err != nil {
		t.Fatal(err)
	}
	return read(t, img)
}

func read(t testing.TB, img v1.Image) *Pulled {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	p := &Pulled{}
	d, err := img.Digest()
	must(err)
	p.Digest = d.String()
	p.Manifest, err = img.Manifest()
	must(err)
	p.Config, err = img.ConfigFile()
	must(err)
	layers, err := img.Layers()
	must(err)
	for i, l := range layers {
		rc, err := l.Uncompressed()
		must(err)
		b, err := io.ReadAll(rc)
		must(err)
		rc.Close()
		h, _, err := v1.SHA256(bytes.NewReader(b))
		must(err)
		if h != p.Config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d: its diff ID is %s, the config says %s", i, h, p.Config.RootFS.DiffIDs[i])
		}
		p.Layers = append(p.Layers, b)
	}
	return p
}

// TarOf packs a directory.
func TarOf(t testing.TB, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || path == dir {
			return err
		}
		link := ""
		if fi.Mode()&os.ModeSymlink != 0 {
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, link)
		if err != nil {
			return err
		}
		if h.Name, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		if fi.IsDir() {
			h.Name += "/"
		}
		h.Uname, h.Gname = "", ""
		if err := tw.WriteHeader(h); err != nil || !fi.Mode().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(tw, f)
		return err
	})
	if err == nil {
		err = tw.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// PushBusybox pushes an image with a static busybox and a shell.
func (r *Registry) PushBusybox(t testing.TB, ref string) v1.Image {
	t.Helper()
	return r.Push(t, ref, func(c *v1.ConfigFile) { c.Config.Cmd = []string{"sh"} }, TarOf(t, BusyboxTree(t)))
}
