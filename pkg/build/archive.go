package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// archive is an opened archive: its entries, and a view of their content, in
// which the path of an entry is its number.
type archive struct {
	entries []archiveEntry
	view    snapshot.View
}

type archiveEntry struct {
	snapshot.Entry
	at int64 // where in the tar the content begins
}

// openArchive opens the file at path in v if it is an archive: a tar, plain or
// compressed with gzip, bzip2, xz or zstd, told by its content. If it is not,
// it returns nil. The content of a compressed one is kept in a file on the
// volume until that is closed.
func openArchive(ctx context.Context, volume *cache.Disk, v snapshot.View, path string) (*archive, error) {
	r, err := v.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	br := bufio.NewReaderSize(r, 64<<10)
	plain, compressed, err := decompressArchive(br)
	if err != nil || !startsTar(plain) {
		return nil, nil // not an archive, then
	}
	file, isFile := r.(*os.File)
	if compressed || !isFile {
		dir, err := volume.TempDir("archive-")
		if err != nil {
			return nil, err
		}
		if file, err = os.Create(dir + "/tar"); err != nil {
			return nil, err
		}
		defer file.Close()
		if _, err := io.Copy(file, plain); err != nil {
			return nil, fmt.Errorf("unpack /%s: %w", path, err)
		}
		v, path = snapshot.NewDirView(dir, nil), "tar"
	}
	a, err := listArchive(file)
	if err != nil {
		return nil, fmt.Errorf("unpack /%s: %w", path, err)
	}
	a.view = &sections{source: v, path: path, entries: a.entries}
	return a, nil
}

// decompressArchive returns what is in a compressed file, and whether it is
// compressed at all.
func decompressArchive(br *bufio.Reader) (*bufio.Reader, bool, error) {
	magic, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, false, err
	}
	var plain io.Reader
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		plain, err = kgzip.NewReader(br)
	case bytes.HasPrefix(magic, []byte("BZh")):
		plain, err = bzip2.NewReader(br), nil
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ\x00")):
		plain, err = xz.NewReader(br)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(br, zstd.WithDecoderConcurrency(1)); err == nil {
			plain = z.IOReadCloser()
		}
	default:
		return br, false, nil
	}
	if err != nil {
		return nil, true, err
	}
	return bufio.NewReaderSize(plain, 64<<10), true, nil
}

// startsTar reports whether what r has is a tar, by its first header.
func startsTar(r *bufio.Reader) bool {
	head, err := r.Peek(3 * 512) // long enough for a PAX header and what it is of
	if err != nil && err != io.EOF || len(head) < 512 {
		return false
	}
	_, err = tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF)
}

// listArchive reads the headers of a plain tar. f is read from its start.
func listArchive(f *os.File) (*archive, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &archive{}
	tr := tar.NewReader(f) // reads no further than it must, so that f is where the content begins
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := snapshot.EntryOfHeader(snapshot.Clean(h.Name), h)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", h.Name, err)
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if isSparse(h) {
			return nil, fmt.Errorf("%q: sparse files in archives are not supported", h.Name)
		}
		a.entries = append(a.entries, archiveEntry{Entry: e, at: at})
	}
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// sections is a view of the content of an archive's entries: the path of an
// entry is its number.
type sections struct {
	source  snapshot.View
	path    string // of the tar in source
	entries []archiveEntry
}

func (s *sections) entry(path string) (*archiveEntry, error) {
	n, err := strconv.Atoi(path)
	if err != nil || n < 0 || n >= len(s.entries) {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	return &s.entries[n], nil
}

func (s *sections) Lstat(path string) (snapshot.Entry, error) {
	e, err := s.entry(path)
	if err != nil {
		return snapshot.Entry{}, err
	}
	return e.Entry, nil
}

func (s *sections) ReadDir(path string) ([]snapshot.Entry, error) {
	return nil, &fs.PathError{Op: "readdir", Path: path, Err: syscall.ENOTDIR}
}

func (s *sections) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	e, err := s.entry(path)
	if err != nil {
		return nil, err
	}
	r, err := s.source.Open(ctx, s.path)
	if err != nil {
		return nil, err
	}
	f, ok := r.(*os.File)
	if !ok {
		r.Close()
		return nil, &fs.PathError{Op: "open", Path: s.path, Err: errors.ErrUnsupported}
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, e.at, e.Size), f}, nil
}

// unpack puts the archive's entries into the directory dest of the draft. To
// them, dest is the root: links in the archive do not lead out of it. What is
// in the way is replaced, but directories are merged.
func (a *archive) unpack(d *snapshot.Draft, dest string, o *owner, now int64) error {
	u := &unpacking{archive: a, draft: d, dest: dest, owner: o, now: now}
	for i := range a.entries {
		if err := u.entry(i); err != nil {
			return fmt.Errorf("unpack %q: %w", a.entries[i].Path, err)
		}
	}
	return nil
}

type unpacking struct {
	archive *archive
	draft   *snapshot.Draft
	dest    string
	owner   *owner
	now     int64
}

func (u *unpacking) entry(i int) error {
	e := u.archive.entries[i].Entry
	if e.Path == "" {
		return nil
	}
	dir, name := snapshot.Split(e.Path)
	parent, err := snapshot.Resolve(subView{u.draft, u.dest}, dir, true)
	if err != nil {
		return err
	}
	parent = joinPath(u.dest, parent)
	if err := makeDirs(u.draft, parent, 0o755, owner{}, u.now); err != nil {
		return err
	}
	path := snapshot.Join(parent, name)
	if u.owner != nil {
		e.UID, e.GID = u.owner.uid, u.owner.gid
	}
	old, exists, err := lstat(u.draft, path)
	if err != nil {
		return err
	}
	if exists && (old.Type != snapshot.Dir || e.Type != snapshot.Dir) {
		u.draft.Remove(path)
	}
	link := e.Link
	e.Path = path
	if e.Type == snapshot.Hardlink {
		return u.link(e, link)
	}
	return u.draft.Put(e, u.archive.view, strconv.Itoa(i))
}

// link makes another name for a file that is there.
func (u *unpacking) link(e snapshot.Entry, target string) error {
	dir, name := snapshot.Split(target)
	parent, err := snapshot.Resolve(subView{u.draft, u.dest}, dir, true)
	if err != nil {
		return err
	}
	from := snapshot.Join(joinPath(u.dest, parent), name)
	file, from2, fromPath, err := u.draft.Source(from)
	if err != nil {
		return fmt.Errorf("hard link: %w", err)
	}
	if file.Type == snapshot.Dir {
		return fmt.Errorf("hard link to the directory %q", target)
	}
	if file.Inode == 0 && file.Type == snapshot.File {
		file.Inode = u.draft.NewInode()
		if err := u.draft.Put(file, from2, fromPath); err != nil {
			return err
		}
	}
	file.Path = e.Path
	return u.draft.Put(file, from2, fromPath)
}

// joinPath is snapshot.Join for a path that may be "".
func joinPath(dir, path string) string {
	if path == "" {
		return dir
	}
	return snapshot.Join(dir, path)
}

// subView is a directory of a view as a view of its own. It serves to resolve
// paths.
type subView struct {
	snapshot.View
	dir string
}

func (v subView) Lstat(path string) (snapshot.Entry, error) {
	return v.View.Lstat(joinPath(v.dir, path))
}
