package snapshot

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ApplyOptions says how a layer is unpacked. The zero value works.
type ApplyOptions struct {
	// Lower is what the layers below show. It is asked only for directories
	// that the layer's tar passes through without carrying them. nil is empty.
	Lower View
	// Workers is how many goroutines make small files; 0 is 3, which keeps two
	// cores busy beside decompression. More only queue on the file system's
	// journal.
	Workers int
}

// Applied is what Apply has found in a layer.
type Applied struct {
	// TOC lists what the tar carries, under the names that it uses.
	TOC *TOC
	// Dependent is set if the tar passes through directories that it does not
	// carry, so that the tree takes these from the layers below and cannot be
	// used on top of others.
	Dependent bool
	// Skipped lists the device nodes that the process may not make.
	Skipped []string
}

// Apply unpacks the uncompressed layer tar r into dir, which must be an empty
// directory that nobody else touches meanwhile. The result is a tree: a
// directory in overlayfs's upper format, where a character device 0:0 is a
// deletion and user.overlay.opaque=y marks a directory that hides all below.
//
// A hostile tar cannot reach outside dir: every file is made relative to an
// open directory without following links, names are clipped at the root, and
// overlayfs's own attributes are never taken from a tar. Where an entry's
// parent is a symlink, in this layer or in Lower, it is resolved inside the
// image, as containerd does. If a path comes twice, the last one counts.
//
// After an error, dir holds a partial tree that the caller removes.
func Apply(ctx context.Context, r io.Reader, dir string, opts ApplyOptions) (*Applied, error) {
	if opts.Lower == nil {
		opts.Lower = Empty
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("unpack into %s: %w", dir, err)
	}
	a := &applier{lower: opts.Lower, dirs: newDirCache(root), meta: map[string]Entry{}}
	defer a.dirs.close()
	a.makers = startMakers(ctx, max(opts.Workers, 0))
	err = a.readAll(ctx, tar.NewReader(r))
	if err2 := a.makers.stop(); err == nil {
		err = err2
	}
	if err == nil {
		err = a.finishDirs(root)
	}
	if err != nil {
		return nil, err
	}
	toc, err := NewTOC(a.entries)
	if err != nil {
		return nil, err
	}
	return &Applied{TOC: toc, Dependent: a.dependent, Skipped: a.makers.skipped}, nil
}

// applier reads the tar. Directories, links and whiteouts are made by its own
// goroutine; files, symlinks and devices are handed to the makers.
type applier struct {
	lower     View
	makers    *makers
	dirs      *dirCache
	entries   []Entry
	meta      map[string]Entry // real path -> what the directory shall be in the end
	dependent bool
}

func (a *applier) readAll(ctx context.Context, tr *tar.Reader) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := a.entry(h, tr); err != nil {
			return fmt.Errorf("unpack %.200q: %w", h.Name, err)
		}
	}
}

func (a *applier) entry(h *tar.Header, content io.Reader) error {
	path := cleanName(h.Name)
	if path == "" {
		return nil // the root is a plain directory in every image
	}
	if len(path) >= unix.PathMax {
		return fmt.Errorf("the path has %d bytes: %w", len(path), unix.ENAMETOOLONG)
	}
	dir, name := Split(path)
	if strings.HasPrefix(name, whiteoutPrefix) {
		return a.whiteout(dir, name)
	}
	e, err := EntryOfHeader(path, h)
	if err != nil {
		return err
	}
	parent, err := a.parent(dir, 0)
	if err != nil {
		return err
	}
	defer parent.release()
	a.entries = append(a.entries, e)
	real := Join(parent.path, name)
	switch e.Type {
	case Dir:
		return a.mkdir(parent, name, e)
	case Hardlink:
		return a.link(parent, name, e.Link)
	}
	if _, ok := a.meta[real]; ok {
		if err := a.removeDir(parent, name); err != nil {
			return err
		}
	}
	return a.makers.add(parent, real, name, e, content)
}

// cleanName is Clean, quick for the names that layers usually have.
func cleanName(s string) string {
	s = strings.TrimSuffix(strings.TrimPrefix(s, "./"), "/")
	if s == "" || s == "." {
		return ""
	}
	if s[0] == '/' || strings.Contains(s, "//") || strings.Contains(s, "./") || strings.HasSuffix(s, "/.") || strings.HasSuffix(s, "..") {
		return Clean(s)
	}
	return s
}

// EntryOfHeader turns the header of any tar into an entry with the given path.
// Overlayfs's own attributes are left out.
func EntryOfHeader(path string, h *tar.Header) (Entry, error) {
	e := Entry{
		Path: path, Mode: uint32(h.Mode) & 0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid),
		ModTime: boundedNano(h.ModTime),
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= math.MaxUint32 || int64(h.Gid) >= math.MaxUint32 {
		return e, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrRecord)
		if !ok || strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "trusted.") {
			continue
		}
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[name] = v
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		e.Type, e.Size = File, h.Size
	case tar.TypeDir:
		e.Type = Dir
	case tar.TypeSymlink:
		e.Type, e.Link = Symlink, h.Linkname
	case tar.TypeLink:
		e.Type, e.Link = Hardlink, cleanName(h.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		e.Type = Char
		if h.Typeflag == tar.TypeBlock {
			e.Type = Block
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		if e.Type == Char && e.Major == 0 && e.Minor == 0 {
			return e, fmt.Errorf("character device 0:0 is overlayfs's mark of a deleted file")
		}
	case tar.TypeFifo:
		e.Type = Fifo
	default:
		return e, fmt.Errorf("unknown tar entry type %q", h.Typeflag)
	}
	return e, nil
}

// boundedNano is t in ns since 1970, at the nearest end of the range that has
// room for it.
func boundedNano(t time.Time) int64 {
	switch s := t.Unix(); {
	case s <= math.MinInt64/1_000_000_000:
		return math.MinInt64
	case s >= math.MaxInt64/1_000_000_000:
		return math.MaxInt64
	}
	return t.UnixNano()
}

// whiteout makes the mark for a deletion. Order does not matter: a whiteout
// speaks of lower layers only, so it never removes what this layer brings.
func (a *applier) whiteout(dir, name string) error {
	parent, err := a.parent(dir, 0)
	if err != nil {
		return err
	}
	defer parent.release()
	if name == opaqueName {
		if dir == "" {
			return fmt.Errorf("the root cannot be opaque")
		}
		a.entries = append(a.entries, Entry{Path: dir, Type: Dir, Mode: 0o755, Opaque: true, Implicit: true})
		return setOpaque(parent.fd)
	}
	if strings.HasPrefix(name, whiteoutPrefix+whiteoutPrefix) {
		return nil // aufs's own notes
	}
	name = name[len(whiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("invalid whiteout")
	}
	a.entries = append(a.entries, Entry{Path: Join(dir, name), Type: Whiteout})
	err = unix.Mknodat(parent.fd, name, unix.S_IFCHR, 0)
	if err != unix.EEXIST {
		return err
	}
	// This layer brings the path anew. A directory must then hide the old one.
	fd, err := unix.Openat(parent.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	return setOpaque(fd)
}

func setOpaque(fd int) error {
	if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("set %s: %w", opaqueXattr, err)
	}
	return nil
}

// mkdir makes the directory of an entry. Its metadata is set at the end, since
// files still to be made below it would change its time, or find it closed.
func (a *applier) mkdir(parent *dirHandle, name string, e Entry) error {
	real := Join(parent.path, name)
	if _, ok := a.meta[real]; ok {
		a.meta[real] = e
		return nil
	}
	if err := a.makers.settle(real); err != nil {
		return err
	}
	err := unix.Mkdirat(parent.fd, name, 0o700)
	if err == unix.EEXIST {
		// Something that is no directory, or a whiteout: a directory here and
		// a deletion of what was below are an opaque directory.
		err = a.replaceWithDir(parent, name)
	}
	a.meta[real] = e
	return err
}

func (a *applier) replaceWithDir(parent *dirHandle, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(parent.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := unix.Unlinkat(parent.fd, name, 0); err != nil {
		return err
	}
	a.dirs.forget(Join(parent.path, name))
	if err := unix.Mkdirat(parent.fd, name, 0o700); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		return nil
	}
	fd, err := unix.Openat(parent.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return setOpaque(fd)
}

// removeDir removes a directory of this layer that another file replaces.
func (a *applier) removeDir(parent *dirHandle, name string) error {
	if err := a.makers.drain(); err != nil {
		return err
	}
	real := Join(parent.path, name)
	a.dirs.forget(real)
	for p := range a.meta {
		if p == real || below(p, real) {
			delete(a.meta, p)
		}
	}
	return removeAllAt(parent.fd, name)
}

// link makes another name for a file of this layer.
func (a *applier) link(parent *dirHandle, name, target string) error {
	dir, base := Split(target)
	from, err := a.parent(dir, 0)
	if err != nil {
		return err
	}
	defer from.release()
	if err := a.makers.drain(); err != nil {
		return err
	}
	for {
		err := unix.Linkat(from.fd, base, parent.fd, name, 0)
		switch err {
		case unix.EEXIST:
			if from.path == parent.path && base == name {
				return nil
			}
			if err := a.removeDir(parent, name); err != nil {
				return err
			}
			continue
		case unix.ENOENT:
			return fmt.Errorf("hard link to %q, which this layer does not have", target)
		}
		return err
	}
}

// finishDirs gives every directory its owner, mode and time, the deepest
// first.
func (a *applier) finishDirs(root int) error {
	paths := make([]string, 0, len(a.meta))
	for p := range a.meta {
		paths = append(paths, p)
	}
	slices.SortFunc(paths, func(x, y string) int { return ComparePaths(y, x) })
	for _, p := range paths {
		fd, err := openBeneath(root, p, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == nil {
			e := a.meta[p]
			err = finishFile(fd, &e)
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("unpack %q: %w", p, err)
		}
	}
	return nil
}
