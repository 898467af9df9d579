package snapshot

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// opaqueXattr marks an opaque directory of a tree. Only this one form is ever
// written, and trees are always mounted with userxattr: a mount ignores the
// marks of the other form, and deleted files would reappear.
const opaqueXattr = "user.overlay.opaque"

// treeSource answers for a layer from its tree.
type treeSource struct {
	dir   string
	layer int
}

func (s *treeSource) lookup(path string) (Entry, error) {
	e, err := lstatEntry(s.dir, path)
	if err != nil {
		if errors.Is(err, syscall.ENOTDIR) {
			return Entry{}, fs.ErrNotExist
		}
		return Entry{}, err
	}
	s.finish(&e)
	return e, nil
}

func (s *treeSource) finish(e *Entry) {
	switch {
	case e.Type == Char && e.Major == 0 && e.Minor == 0:
		e.Type = Whiteout
	case e.Type == Dir:
		e.Opaque = isOpaque(s.dir + "/" + e.Path)
	}
	if e.Inode != 0 {
		e.Inode ^= uint64(s.layer+1) << 48
	}
}

func (s *treeSource) list(path string) ([]Entry, error) {
	out, err := readDirEntries(s.dir, path)
	for i := range out {
		s.finish(&out[i])
	}
	return out, err
}

func (s *treeSource) open(_ context.Context, path string) (io.ReadCloser, error) {
	return openNoFollow(s.dir, path)
}

// lstatEntry describes the file dir/path. Only the last element of path may be
// a symlink; that is the caller's to make sure.
func lstatEntry(dir, path string) (Entry, error) {
	full := dir + "/" + path
	var st unix.Stat_t
	for {
		err := unix.Lstat(full, &st)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return Entry{}, &fs.PathError{Op: "lstat", Path: "/" + path, Err: err}
		}
		break
	}
	return entryOf(full, path, &st)
}

// entryOf turns what stat says of the file at full into the entry for path.
func entryOf(full, path string, st *unix.Stat_t) (Entry, error) {
	e := Entry{
		Path: path, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid,
		ModTime: st.Mtim.Sec*1e9 + st.Mtim.Nsec,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type = File
		e.Size = st.Size
		if st.Nlink > 1 {
			e.Inode = st.Ino
		}
		xattrs, err := fileCapability(full)
		if err != nil {
			return Entry{}, &fs.PathError{Op: "getxattr", Path: "/" + path, Err: err}
		}
		e.Xattrs = xattrs
	case unix.S_IFDIR:
		e.Type = Dir
	case unix.S_IFLNK:
		e.Type = Symlink
		link, err := os.Readlink(full)
		if err != nil {
			return Entry{}, err
		}
		e.Link = link
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Type = Char
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Type = Block
		}
		e.Major, e.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))
	case unix.S_IFIFO:
		e.Type = Fifo
	case unix.S_IFSOCK:
		e.Type = socket
	}
	return e, nil
}

// socket is the type of a file that no layer can carry. It never leaves this
// package.
const socket Type = 255

func fileCapability(full string) (map[string]string, error) {
	var buf [64]byte // a version 3 capability has 24 bytes
	n, err := unix.Lgetxattr(full, Capability, buf[:])
	switch err {
	case nil:
		return map[string]string{Capability: string(buf[:n])}, nil
	case unix.ENODATA, unix.ENOTSUP:
		return nil, nil
	}
	return nil, err
}

func isOpaque(full string) bool {
	var buf [8]byte
	n, err := unix.Lgetxattr(full, opaqueXattr, buf[:])
	return err == nil && n == 1 && buf[0] == 'y'
}

// readDirEntries describes what is in the directory dir/path, sorted, without
// sockets.
func readDirEntries(dir, path string) ([]Entry, error) {
	// Not os.ReadDir, which would wait for a writer if this were a FIFO.
	fd, err := unix.Open(dir+"/"+path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: "/" + path, Err: err}
	}
	defer unix.Close(fd)
	names, err := namesIn(fd)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: "/" + path, Err: err}
	}
	slices.Sort(names)
	out := make([]Entry, 0, len(names))
	for _, n := range names {
		e, err := lstatEntry(dir, Join(path, n))
		if err != nil {
			return nil, err
		}
		if e.Type != socket {
			out = append(out, e)
		}
	}
	return out, nil
}

// openNoFollow opens the regular file dir/path for reading. It never follows a
// symlink in path, nor blocks on a FIFO that has taken the file's place.
func openNoFollow(dir, path string) (*os.File, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	fd, err := openBeneath(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME)
	if err == unix.EPERM { // O_NOATIME needs ownership
		fd, err = openBeneath(root, path, unix.O_RDONLY|unix.O_NONBLOCK)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "/" + path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openBeneath opens path below root without following any symlink.
func openBeneath(root int, path string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if path == "" {
		path = "."
	}
	for {
		fd, err := unix.Openat2(root, path, &how)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case unix.ENOSYS, unix.EPERM: // Linux before 5.6, or a seccomp filter that does not know it
			return openByElement(root, path, flags)
		}
		return fd, err
	}
}

// openByElement is openBeneath for kernels without openat2.
func openByElement(root int, path string, flags int) (int, error) {
	dir := root
	for {
		name, rest := path, ""
		for i := range len(path) {
			if path[i] == '/' {
				name, rest = path[:i], path[i+1:]
				break
			}
		}
		f := unix.O_PATH | unix.O_DIRECTORY
		if rest == "" {
			f = flags
		}
		fd, err := unix.Openat(dir, name, f|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if dir != root {
			unix.Close(dir)
		}
		if err != nil || rest == "" {
			return fd, err
		}
		dir, path = fd, rest
	}
}
