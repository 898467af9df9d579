package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A Layout is an OCI image layout: a directory with blobs and an index of the
// manifests among them. Several processes may write to one at the same time.
type Layout struct{ dir string }

// OpenLayout opens an existing layout for reading.
func OpenLayout(dir string) (*Layout, error) {
	b, err := os.ReadFile(filepath.Join(dir, ocispec.ImageLayoutFile))
	if err != nil {
		return nil, fmt.Errorf("OCI layout: %w", err)
	}
	var l ocispec.ImageLayout
	if err := json.Unmarshal(b, &l); err != nil || l.Version != ocispec.ImageLayoutVersion {
		return nil, fmt.Errorf("OCI layout %s: version %q is not %s", dir, l.Version, ocispec.ImageLayoutVersion)
	}
	return &Layout{dir}, nil
}

// CreateLayout opens the layout in dir and makes one if there is none.
func CreateLayout(dir string) (*Layout, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, fmt.Errorf("OCI layout: %w", err)
	}
	l := &Layout{dir}
	if _, err := os.Stat(filepath.Join(dir, ocispec.ImageLayoutFile)); errors.Is(err, fs.ErrNotExist) {
		b, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
		if err != nil {
			return nil, err
		}
		if err := l.writeFile(ocispec.ImageLayoutFile, b); err != nil {
			return nil, fmt.Errorf("OCI layout: %w", err)
		}
	}
	return OpenLayout(dir)
}

// Dir is the layout's directory.
func (l *Layout) Dir() string { return l.dir }

func (l *Layout) blobPath(d digest.Digest) string {
	return filepath.Join(l.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// Index returns the layout's list of manifests.
func (l *Layout) Index() (ocispec.Index, error) {
	var idx ocispec.Index
	b, err := os.ReadFile(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if errors.Is(err, fs.ErrNotExist) {
		return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &idx)
	}
	if err != nil {
		return idx, fmt.Errorf("OCI layout: %s: %w", ocispec.ImageIndexFile, err)
	}
	return idx, nil
}

// Find returns the descriptor of the manifest or index called name: a digest,
// or the value of its annotation org.opencontainers.image.ref.name, or "" if
// the layout has only one. The error wraps ErrNotFound if there is none.
func (l *Layout) Find(name string) (ocispec.Descriptor, error) {
	idx, err := l.Index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if name == "" {
		if len(idx.Manifests) == 1 {
			return idx.Manifests[0], nil
		}
		return ocispec.Descriptor{}, fmt.Errorf("OCI layout %s: has %d images: say which one", l.dir, len(idx.Manifests))
	}
	for _, d := range idx.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == name || d.Digest.String() == name {
			return d, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("OCI layout %s: %s: %w", l.dir, name, ErrNotFound)
}

// Blob opens a blob. The content is not verified.
func (l *Layout) Blob(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	f, err := os.Open(l.blobPath(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("OCI layout %s: blob %s: %w", l.dir, desc.Digest, ErrNotFound)
	}
	return f, err
}

// BlobBytes returns a small blob, verified.
func (l *Layout) BlobBytes(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	r, err := l.Blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxManifest))
	if err == nil && desc.Digest.Algorithm().FromBytes(b) != desc.Digest {
		err = fmt.Errorf("OCI layout %s: blob %s: %w", l.dir, desc.Digest, ErrDigest)
	}
	return b, err
}

// PushBlob makes sure that the layout has the blob.
func (l *Layout) PushBlob(ctx context.Context, b Blob) (How, error) {
	if err := b.Digest.Validate(); err != nil {
		return "", err
	}
	path := l.blobPath(b.Digest)
	if fi, err := os.Stat(path); err == nil && fi.Size() == b.Size {
		return Existed, nil
	}
	r, err := b.Open(ctx)
	if err != nil {
		return "", err
	}
	defer r.Close()
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	v := b.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(tmp, v), contextReader{ctx, r}); err != nil {
		return "", fmt.Errorf("OCI layout %s: blob %s: %w", l.dir, b.Digest, err)
	}
	if !v.Verified() {
		return "", fmt.Errorf("OCI layout %s: blob %s: %w", l.dir, b.Digest, ErrDigest)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return "", err
	}
	if err := tmp.Close(); err != nil {
		return "", err
	}
	return Uploaded, os.Rename(tmp.Name(), path)
}

// contextReader stops when its context ends.
type contextReader struct {
	ctx context.Context // an io.Reader has no other way to take it
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// PushManifest adds a manifest, and names it in the index: as the only one
// without a name if name is "". Whatever had the name loses it.
func (l *Layout) PushManifest(ctx context.Context, name, mediaType string, content []byte) error {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
	if _, err := l.PushBlob(ctx, Blob{Descriptor: desc, Open: openBytes(content)}); err != nil {
		return err
	}
	if name != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	lock, err := os.OpenFile(filepath.Join(l.dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return fmt.Errorf("OCI layout: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("OCI layout: lock %s: %w", lock.Name(), err)
	}
	idx, err := l.Index()
	if err != nil {
		return err
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
		return d.Annotations[ocispec.AnnotationRefName] == name
	})
	idx.Manifests = append(idx.Manifests, desc)
	b, err := json.MarshalIndent(idx, "", "  ")
	if err != nil {
		return err
	}
	return l.writeFile(ocispec.ImageIndexFile, b)
}

func (l *Layout) writeFile(name string, content []byte) error {
	tmp, err := os.CreateTemp(l.dir, ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(content)
	if err == nil {
		err = tmp.Chmod(0o644)
	}
	if err2 := tmp.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), filepath.Join(l.dir, name))
}
