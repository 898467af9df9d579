package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

func (d *Disk) blobPath(dg digest.Digest) string { return d.hexPath("blobs/sha256", dg) }

// HasBlob reports whether the volume has the blob, as far as that can be said
// without reading it.
func (d *Disk) HasBlob(desc ocispec.Descriptor) bool {
	if desc.Digest.Validate() != nil || desc.Digest.Algorithm() != digest.SHA256 {
		return false
	}
	fi, err := os.Stat(d.blobPath(desc.Digest))
	return err == nil && (desc.Size <= 0 || fi.Size() == desc.Size)
}

// OpenBlob opens a blob of the volume. The content is not verified: after a
// crash of the machine a blob can be damaged, so that whoever reads all of it
// checks its digest and calls RemoveBlob if it is wrong. A blob that is not
// there, or has the wrong size, gives an error that wraps fs.ErrNotExist.
func (d *Disk) OpenBlob(desc ocispec.Descriptor) (*os.File, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, err
	}
	f, err := os.Open(d.blobPath(desc.Digest))
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && desc.Size > 0 && fi.Size() != desc.Size {
		err = fmt.Errorf("blob %s: has %d bytes, want %d: %w", desc.Digest, fi.Size(), desc.Size, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadBlob returns a small blob of the volume, verified. One that is damaged
// is removed and counts as not there: the error wraps fs.ErrNotExist.
func (d *Disk) ReadBlob(desc ocispec.Descriptor, limit int64) ([]byte, error) {
	f, err := d.OpenBlob(desc)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("blob %s: larger than %d bytes", desc.Digest, limit)
	}
	if digest.FromBytes(b) != desc.Digest {
		d.RemoveBlob(desc.Digest)
		return nil, fmt.Errorf("blob %s: damaged: %w", desc.Digest, fs.ErrNotExist)
	}
	return b, nil
}

// RemoveBlob removes a blob that has been found to be damaged.
func (d *Disk) RemoveBlob(dg digest.Digest) {
	if !d.readOnly {
		os.Remove(d.blobPath(dg))
	}
}

// WriteBlob adds a small blob.
func (d *Disk) WriteBlob(content []byte) error {
	w, err := d.NewBlob()
	if err != nil {
		return err
	}
	defer w.Abort()
	if _, err := w.Write(content); err != nil {
		return err
	}
	return w.Commit("")
}

// NewBlob begins a blob. End it with Commit or Abort.
func (d *Disk) NewBlob() (*BlobWriter, error) {
	f, err := d.tempFile()
	if err != nil {
		return nil, err
	}
	return &BlobWriter{disk: d, file: f, hash: sha256.New()}, nil
}

// A BlobWriter takes the content of a blob of which the digest need not be
// known before. Use it from one goroutine.
type BlobWriter struct {
	disk *Disk
	file *os.File // nil after the end
	hash hash.Hash
	size int64
}

// Write appends to the blob.
func (w *BlobWriter) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.hash.Write(p[:n])
	w.size += int64(n)
	return n, err
}

// Digest is that of what has been written.
func (w *BlobWriter) Digest() digest.Digest { return digest.NewDigest(digest.SHA256, w.hash) }

// Size is the number of bytes written.
func (w *BlobWriter) Size() int64 { return w.size }

// Commit publishes the blob. If want is not "" and not the blob's digest,
// nothing is published and the error wraps snapshot.ErrDigest.
func (w *BlobWriter) Commit(want digest.Digest) error {
	got := w.Digest()
	if want != "" && got != want {
		return fmt.Errorf("blob %s: %w: it is %s", want, snapshot.ErrDigest, got)
	}
	f := w.file
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	w.file = nil
	if err := w.disk.publish(f.Name(), w.disk.blobPath(got)); err != nil {
		os.Remove(f.Name())
		return err
	}
	return nil
}

// Abort gives the blob up. After Commit it does nothing.
func (w *BlobWriter) Abort() {
	if w.file != nil {
		w.file.Close()
		os.Remove(w.file.Name())
		w.file = nil
	}
}

// TOC returns the table of contents of the layer with this diff ID. A table
// that is damaged counts as not there.
func (d *Disk) TOC(diffID digest.Digest) (*snapshot.TOC, error) {
	if err := diffID.Validate(); err != nil {
		return nil, err
	}
	path := d.hexPath("toc", diffID)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	toc, err := snapshot.DecodeTOC(b)
	if errors.Is(err, snapshot.ErrDamaged) {
		if !d.readOnly {
			os.Remove(path)
		}
		return nil, fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	}
	return toc, err
}

// PutTOC stores the table of contents of a layer.
func (d *Disk) PutTOC(diffID digest.Digest, toc *snapshot.TOC) error {
	h := diffID.Encoded()
	return d.writeFile("toc/"+h[:2]+"/"+h, toc.Encode())
}

// Fetch makes sure that the volume has the blob, reading it from open if it
// does not. Only one process fetches a blob at a time; the others wait for it.
func (d *Disk) Fetch(ctx context.Context, desc ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) error {
	if d.HasBlob(desc) {
		return nil
	}
	unlock, err := d.lock(ctx, "blob-"+desc.Digest.Encoded())
	if err != nil {
		return err
	}
	defer unlock()
	if d.HasBlob(desc) {
		return nil
	}
	r, err := open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := d.NewBlob()
	if err != nil {
		return err
	}
	defer w.Abort()
	if _, err := io.Copy(w, r); err != nil {
		return fmt.Errorf("fetch blob %s: %w", desc.Digest, err)
	}
	return w.Commit(desc.Digest)
}
