package snapshot

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Files up to this size are read whole and made by a maker; larger ones are
// written while they are read. Measured: four times as much gains nothing.
const makeWhole = 256 << 10

const (
	defaultMakers = 3
	makersQueue   = 48 // with makeWhole, the bound of the memory in use
)

// makers is a group of goroutines that make files, symlinks and devices in
// open directories. Errors stop it; add, drain and stop report the first.
type makers struct {
	ctx     context.Context // lives as long as Apply
	jobs    chan job
	wg      sync.WaitGroup
	bufs    sync.Pool
	copyBuf []byte

	mu      sync.Mutex
	idle    *sync.Cond
	pending map[string]bool
	err     error
	skipped []string
}

type job struct {
	dir  *dirHandle
	real string
	name string
	e    Entry
	data *[]byte
}

func startMakers(ctx context.Context, n int) *makers {
	if n == 0 {
		n = defaultMakers
	}
	m := &makers{ctx: ctx, jobs: make(chan job, makersQueue), pending: map[string]bool{}}
	m.idle = sync.NewCond(&m.mu)
	m.bufs.New = func() any { b := make([]byte, 0, makeWhole); return &b }
	for range n {
		m.wg.Go(func() {
			for j := range m.jobs {
				m.finish(j, m.make(j))
			}
		})
	}
	return m
}

// add makes e as dir/name, now or soon. The content is read before it returns.
func (m *makers) add(dir *dirHandle, real, name string, e Entry, content io.Reader) error {
	if err := m.settle(real); err != nil {
		return err
	}
	if e.Type == File && e.Size > makeWhole {
		return m.stream(dir, name, &e, content)
	}
	j := job{dir: dir, real: real, name: name, e: e}
	if e.Type == File && e.Size > 0 {
		j.data = m.bufs.Get().(*[]byte)
		*j.data = (*j.data)[:e.Size]
		if _, err := io.ReadFull(content, *j.data); err != nil {
			return err
		}
	}
	m.mu.Lock()
	if m.err != nil {
		m.mu.Unlock()
		return m.err
	}
	m.pending[real] = true
	m.mu.Unlock()
	dir.refs.Add(1)
	m.jobs <- j
	return nil
}

// settle waits if the file at the real path is still being made.
func (m *makers) settle(real string) error {
	m.mu.Lock()
	busy := m.pending[real]
	m.mu.Unlock()
	if !busy {
		return nil
	}
	return m.drain()
}

// drain waits until all that was added is made.
func (m *makers) drain() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.pending) > 0 {
		m.idle.Wait()
	}
	return m.err
}

// stop waits for everything and ends the goroutines.
func (m *makers) stop() error {
	close(m.jobs)
	m.wg.Wait()
	return m.err
}

func (m *makers) finish(j job, err error) {
	j.dir.release()
	if j.data != nil {
		m.bufs.Put(j.data)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pending, j.real)
	if err != nil && m.err == nil {
		m.err = &pathError{j.real, err}
	}
	if len(m.pending) == 0 {
		m.idle.Broadcast()
	}
}

// pathError names a file of the layer; unlike fs.PathError it needs no word
// for the operation, which the reader would not know.
type pathError struct {
	path string
	err  error
}

func (e *pathError) Error() string { return "unpack " + "/" + e.path + ": " + e.err.Error() }
func (e *pathError) Unwrap() error { return e.err }

func (m *makers) make(j job) error {
	if m.ctx.Err() != nil {
		return context.Cause(m.ctx)
	}
	for {
		err := m.makeOnce(j)
		if err != unix.EEXIST {
			return err
		}
		// A whiteout, or the same path again: the last one counts.
		if err := removeAllAt(j.dir.fd, j.name); err != nil {
			return err
		}
	}
}

func (m *makers) makeOnce(j job) error {
	switch j.e.Type {
	case File:
		fd, err := createFile(j.dir.fd, j.name)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if j.data != nil {
			if err := writeAll(fd, *j.data); err != nil {
				return err
			}
		}
		return finishFile(fd, &j.e)
	case Symlink:
		if err := unix.Symlinkat(j.e.Link, j.dir.fd, j.name); err != nil {
			return err
		}
	case Fifo:
		if err := unix.Mknodat(j.dir.fd, j.name, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	case Char, Block:
		mode := uint32(unix.S_IFCHR)
		if j.e.Type == Block {
			mode = unix.S_IFBLK
		}
		err := unix.Mknodat(j.dir.fd, j.name, mode|0o600, int(unix.Mkdev(j.e.Major, j.e.Minor)))
		if err == unix.EPERM {
			m.mu.Lock()
			m.skipped = append(m.skipped, j.real)
			m.mu.Unlock()
			return nil
		}
		if err != nil {
			return err
		}
	}
	return finishSpecial(j.dir.fd, j.name, &j.e)
}

// stream makes a large file.
func (m *makers) stream(dir *dirHandle, name string, e *Entry, content io.Reader) error {
	fd, err := createFile(dir.fd, name)
	if err == unix.EEXIST {
		if err = removeAllAt(dir.fd, name); err == nil {
			fd, err = createFile(dir.fd, name)
		}
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if m.copyBuf == nil {
		m.copyBuf = make([]byte, 4*makeWhole)
	}
	for left := e.Size; left > 0; {
		if m.ctx.Err() != nil {
			return context.Cause(m.ctx)
		}
		buf := m.copyBuf[:min(left, int64(len(m.copyBuf)))]
		if _, err := io.ReadFull(content, buf); err != nil {
			return err
		}
		if err := writeAll(fd, buf); err != nil {
			return err
		}
		left -= int64(len(buf))
	}
	return finishFile(fd, e)
}

func createFile(dir int, name string) (int, error) {
	return unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// finishFile gives the open file or directory its owner, attributes, mode and
// time, in the order in which one does not undo the other: a change of owner
// clears setuid bits and capabilities.
func finishFile(fd int, e *Entry) error {
	if err := unix.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
		return ownerError(e, err)
	}
	for name, value := range e.Xattrs {
		if err := unix.Fsetxattr(fd, name, []byte(value), 0); err != nil && !optionalXattr(name, err) {
			return errors.Join(errors.New("set "+name), err)
		}
	}
	if err := unix.Fchmod(fd, e.Mode); err != nil {
		return err
	}
	return setTimes(fd, "", e.ModTime)
}

// finishSpecial is finishFile for what cannot be opened.
func finishSpecial(dir int, name string, e *Entry) error {
	if err := unix.Fchownat(dir, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ownerError(e, err)
	}
	if e.Type != Symlink {
		// The name was just made by us in a directory of ours and is no
		// symlink, so following one is not possible here.
		if err := unix.Fchmodat(dir, name, e.Mode, 0); err != nil {
			return err
		}
	}
	return setTimes(dir, name, e.ModTime)
}

func ownerError(e *Entry, err error) error {
	if err == unix.EINVAL {
		return errors.Join(errors.New("the user namespace has no mapping for the file's owner"), err)
	}
	return err
}

// optionalXattr reports whether an attribute may be left out: all but
// capabilities are, where the file system or the process's rights have no
// place for them.
func optionalXattr(name string, err error) bool {
	return name != Capability && (err == unix.ENOTSUP || err == unix.EPERM || err == unix.EINVAL) || strings.HasPrefix(name, "security.selinux")
}

// setTimes sets both times of the file dir/name, or of dir itself if name is
// "".
func setTimes(dir int, name string, nano int64) error {
	sec := seconds(nano)
	ts := [2]unix.Timespec{{Sec: sec, Nsec: nano - sec*1e9}, {Sec: sec, Nsec: nano - sec*1e9}}
	var p *byte
	if name != "" {
		var err error
		if p, err = unix.BytePtrFromString(name); err != nil {
			return err
		}
	}
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(dir), uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(&ts[0])), uintptr(timesFlags(name)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func timesFlags(name string) int {
	if name == "" {
		return 0
	}
	return unix.AT_SYMLINK_NOFOLLOW
}

// removeAllAt removes dir/name and all that is below it, following nothing.
func removeAllAt(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fchmod(fd, 0o700); err != nil {
		return err
	}
	names, err := namesIn(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeAllAt(fd, n); err != nil {
			return err
		}
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

// namesIn lists an open directory.
func namesIn(fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 16<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}
