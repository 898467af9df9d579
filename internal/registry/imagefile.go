package registry

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An ImageFile is a file or directory with an image, or the root file system
// of one, in it.
type ImageFile struct {
	// Kind says what it is: "oci-layout", "oci-archive", "docker-archive" or
	// "rootfs".
	Kind   string
	path   string
	layout *Layout
	tar    *tarIndex
}

// OpenImageFile opens a directory that is an OCI layout, or a tar: one of an
// OCI layout, one of docker save, or else one of a root file system, which may
// be compressed with gzip or zstd. Close it in the end.
func OpenImageFile(name string) (*ImageFile, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		l, err := OpenLayout(name)
		if err != nil {
			return nil, err
		}
		return &ImageFile{Kind: "oci-layout", path: name, layout: l}, nil
	}
	idx, err := indexTar(name)
	if errors.Is(err, errNoTar) {
		return &ImageFile{Kind: "rootfs", path: name}, nil // compressed, or nothing that can be used
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	f := &ImageFile{path: name, tar: idx}
	switch {
	case idx.files[ocispec.ImageLayoutFile].size > 0 && idx.files[ocispec.ImageIndexFile].size > 0:
		f.Kind = "oci-archive"
	case idx.files["manifest.json"].size > 0:
		f.Kind = "docker-archive"
	default:
		f.Kind = "rootfs"
	}
	return f, nil
}

// Close closes the file.
func (f *ImageFile) Close() error {
	if f.tar != nil {
		return f.tar.file.Close()
	}
	return nil
}

// Rootfs returns the uncompressed tar of a root file system.
func (f *ImageFile) Rootfs() (io.ReadCloser, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return nil, err
	}
	br := bufio.NewReaderSize(file, 1<<20)
	magic, err := br.Peek(512)
	if err != nil && err != io.EOF {
		file.Close()
		return nil, err
	}
	var r io.Reader = br
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		r, err = gzip.NewReader(br)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(br, zstd.WithDecoderConcurrency(1)); err == nil {
			r = z.IOReadCloser()
		}
	default:
		err = nil
		if _, err2 := tar.NewReader(bytes.NewReader(magic)).Next(); len(magic) < 512 || errors.Is(err2, tar.ErrHeader) {
			err = errors.New("is no OCI layout, no archive of docker save, and no tar of a root file system")
		}
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("read %s: %w", f.path, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{r, file}, nil
}

// OCIImage returns the descriptor of the image called name in an OCI layout,
// and how to get at the blobs, which are not verified. The name may be "" if
// there is only one image; the descriptor may be that of an index.
func (f *ImageFile) OCIImage(name string) (ocispec.Descriptor, func(context.Context, ocispec.Descriptor) (io.ReadCloser, error), error) {
	switch f.Kind {
	case "oci-layout":
		desc, err := f.layout.Find(name)
		return desc, f.layout.Blob, err
	case "oci-archive":
		var idx ocispec.Index
		if err := f.tar.json(ocispec.ImageIndexFile, &idx); err != nil {
			return ocispec.Descriptor{}, nil, err
		}
		open := func(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
			if err := d.Digest.Validate(); err != nil {
				return nil, err
			}
			return f.tar.open("blobs/" + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded())
		}
		for _, d := range idx.Manifests {
			if d.Annotations[ocispec.AnnotationRefName] == name || name == "" && len(idx.Manifests) == 1 {
				return d, open, nil
			}
		}
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: has %d images: say which one", f.path, len(idx.Manifests))
	}
	return ocispec.Descriptor{}, nil, fmt.Errorf("%s: is no image", f.path)
}

// DockerImage returns the config of the image called name in an archive of
// docker save, and its layers, lowest first, compressed or not. The name may be
// "" if there is only one image.
func (f *ImageFile) DockerImage(name string) (config []byte, layers []func() (io.ReadCloser, error), err error) {
	var images []dockerManifest
	if err := f.tar.json("manifest.json", &images); err != nil {
		return nil, nil, err
	}
	var found *dockerManifest
	for i := range images {
		if slices.Contains(images[i].RepoTags, name) || name == "" && len(images) == 1 {
			found = &images[i]
		}
	}
	if found == nil {
		return nil, nil, fmt.Errorf("has %d images: say which one", len(images))
	}
	for _, l := range found.Layers {
		layers = append(layers, func() (io.ReadCloser, error) { return f.tar.open(l) })
	}
	config, err = f.tar.read(found.Config)
	return config, layers, err
}

// tarIndex knows where the files of an uncompressed tar are.
type tarIndex struct {
	file  *os.File
	files map[string]section
}

type section struct{ at, size int64 }

// errNoTar says that a file does not begin as a tar does.
var errNoTar = errors.New("no tar")

// indexTar reads the headers of a tar. What is none gives errNoTar.
func indexTar(name string) (*tarIndex, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	idx := &tarIndex{file: f, files: map[string]section{}}
	tr := tar.NewReader(f)
	links := map[string]string{}
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			f.Close()
			if len(idx.files) == 0 {
				err = errNoTar
			}
			return nil, err
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			f.Close()
			return nil, err
		}
		switch p := path.Clean(h.Name); h.Typeflag {
		case tar.TypeReg:
			idx.files[p] = section{at, h.Size}
		case tar.TypeSymlink: // old versions of docker save link equal layers
			links[p] = path.Join(path.Dir(p), h.Linkname)
		case tar.TypeLink:
			links[p] = path.Clean(h.Linkname)
		}
	}
	for from, to := range links {
		if s, ok := idx.files[to]; ok {
			idx.files[from] = s
		}
	}
	return idx, nil
}

func (t *tarIndex) open(name string) (io.ReadCloser, error) {
	s, ok := t.files[path.Clean(name)]
	if !ok {
		return nil, fmt.Errorf("%s: %s: %w", filepath.Base(t.file.Name()), strings.TrimSpace(name), ErrNotFound)
	}
	return io.NopCloser(io.NewSectionReader(t.file, s.at, s.size)), nil
}

func (t *tarIndex) read(name string) ([]byte, error) {
	r, err := t.open(name)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err == nil && len(b) > maxManifest {
		err = fmt.Errorf("%s: larger than %d bytes", name, maxManifest)
	}
	return b, err
}

func (t *tarIndex) json(name string, v any) error {
	b, err := t.read(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
