// Package imagetest makes what tests need: tars from literals, base images, an
// in-process registry that can inject faults, and a private mount namespace.
// Only tests import it.
package imagetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"time"
)

// An Entry is one entry of a tar: a header and, for files, content.
type Entry struct {
	tar.Header
	Content string
}

// Epoch is the modification time of entries that do not set another.
var Epoch = time.Unix(1_700_000_000, 0)

// An Option changes an entry's header.
type Option func(*tar.Header)

// Mode sets the permission bits.
func Mode(m int64) Option { return func(h *tar.Header) { h.Mode = m } }

// Owner sets the numeric owner.
func Owner(uid, gid int) Option { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

// MTime sets the modification time.
func MTime(t time.Time) Option { return func(h *tar.Header) { h.ModTime = t } }

// Xattr adds an extended attribute.
func Xattr(name, value string) Option {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func entry(typ byte, name string, mode int64, opts []Option) Entry {
	e := Entry{Header: tar.Header{Typeflag: typ, Name: name, Mode: mode, ModTime: Epoch}}
	for _, o := range opts {
		o(&e.Header)
	}
	return e
}

// File is a regular file, 0644 and owned by root unless told otherwise.
func File(name, content string, opts ...Option) Entry {
	e := entry(tar.TypeReg, name, 0o644, opts)
	e.Content, e.Size = content, int64(len(content))
	return e
}

// Dir is a directory, 0755.
func Dir(name string, opts ...Option) Entry { return entry(tar.TypeDir, name, 0o755, opts) }

// Symlink is a symbolic link to target.
func Symlink(name, target string, opts ...Option) Entry {
	e := entry(tar.TypeSymlink, name, 0o777, opts)
	e.Linkname = target
	return e
}

// Link is a hard link to target.
func Link(name, target string, opts ...Option) Entry {
	e := entry(tar.TypeLink, name, 0o644, opts)
	e.Linkname = target
	return e
}

// Fifo is a named pipe.
func Fifo(name string, opts ...Option) Entry { return entry(tar.TypeFifo, name, 0o644, opts) }

// Device is a character device.
func Device(name string, major, minor int64, opts ...Option) Entry {
	e := entry(tar.TypeChar, name, 0o666, opts)
	e.Devmajor, e.Devminor = major, minor
	return e
}

// Tar returns the archive of the entries.
func Tar(entries ...Entry) []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Format = tar.FormatPAX
		if err := tw.WriteHeader(&h); err != nil {
			panic(fmt.Sprintf("imagetest: %s: %v", e.Name, err))
		}
		if _, err := tw.Write([]byte(e.Content)); err != nil {
			panic(fmt.Sprintf("imagetest: %s: %v", e.Name, err))
		}
	}
	if err := tw.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// Gzip compresses b.
func Gzip(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}
