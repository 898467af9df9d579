package cache

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// volumeVersion is what the file VERSION of a volume holds.
const volumeVersion = "ondol volume 1\n"

// cacheDirTag tells backup programs to leave the volume out; see
// https://bford.info/cachedir/.
const cacheDirTag = "Signature: 8a477f597d28d172789f06886806bc55\n# This directory holds the cache of ondol builders.\n"

// A Disk is a volume: a directory that the builders and the warmer of a node
// share. Any number of processes use one at the same time, and any of them may
// be killed at any time; all files have their final names only when they are
// complete. It is safe for concurrent use.
//
//	VERSION, CACHEDIR.TAG
//	blobs/sha256/ab/<hex>       manifests, configs and layers as registries have them, 0444
//	toc/ab/<hex>                table of contents of the layer with this diff ID
//	trees/<hex>[.<hex>]/        unpacked layer: fs/, meta.json, lease; see Tree
//	refs/<hex>.json             what a reference leads to; see Ref
//	keys/<scope>/ab/<hex>       cache entry; see Entry
//	locks/<name>                held while something is made that others wait for
//	work/<id>/, work/<id>.lock  what one process is about to make; locked while it lives
type Disk struct {
	dir      string
	readOnly bool
	bootID   string

	mu      sync.Mutex
	session *session
	leases  map[string]*os.File
}

// OpenDisk opens the volume in dir and makes one if there is none. If the
// volume cannot be written to, it is opened read-only. Close it in the end.
func OpenDisk(dir string) (*Disk, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	d := &Disk{dir: dir, leases: map[string]*os.File{}}
	version, err := os.ReadFile(filepath.Join(dir, "VERSION"))
	switch {
	case err == nil && string(version) != volumeVersion:
		return nil, fmt.Errorf("cache volume %s: has format %q, which this version (%q) does not know: use another directory", dir,
			strings.TrimSpace(string(version)), strings.TrimSpace(volumeVersion))
	case errors.Is(err, fs.ErrNotExist):
		if err := d.create(); err != nil {
			return nil, fmt.Errorf("cache volume: %w", err)
		}
	case err != nil:
		return nil, fmt.Errorf("cache volume: %w", err)
	default:
		d.readOnly = unix.Access(dir, unix.W_OK) != nil
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("cache volume: boot ID: %w", err)
	}
	d.bootID = strings.TrimSpace(string(boot))
	if !d.readOnly {
		d.sweep()
	}
	return d, nil
}

// create makes the directories of a volume. VERSION comes last.
func (d *Disk) create() error {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	names, err := os.ReadDir(d.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		// Not to make a mess of a directory that was named by mistake; what
		// file systems and other makers of volumes leave is no reason.
		switch n.Name() {
		case "lost+found", "CACHEDIR.TAG", "blobs", "toc", "trees", "refs", "keys", "locks", "work":
		default:
			if !strings.HasPrefix(n.Name(), ".") {
				return fmt.Errorf("%s: is not empty and no volume: it has %s", d.dir, n.Name())
			}
		}
	}
	for _, sub := range []string{"blobs/sha256", "toc", "trees", "refs", "keys", "locks", "work"} {
		if err := mkdirAll(filepath.Join(d.dir, sub)); err != nil {
			return err
		}
	}
	if err := d.writeFile("CACHEDIR.TAG", []byte(cacheDirTag)); err != nil {
		return err
	}
	return d.writeFile("VERSION", []byte(volumeVersion))
}

// mkdirAll is os.MkdirAll with mode 0755 whatever the umask, so that builders
// under other users can read what is made.
func mkdirAll(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm() == 0o755 {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// Dir is the volume's directory.
func (d *Disk) Dir() string { return d.dir }

// ReadOnly reports whether the volume cannot be written to.
func (d *Disk) ReadOnly() bool { return d.readOnly }

// ErrReadOnly says that something was to be written to a volume that is open
// read-only.
var ErrReadOnly = errors.New("the cache volume is read-only")

// writeFile publishes a small file of the volume, given relative to it.
func (d *Disk) writeFile(name string, content []byte) error {
	if d.readOnly {
		return ErrReadOnly
	}
	tmp, err := d.tempFile()
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	if err == nil {
		err = tmp.Chmod(0o444)
	}
	if err2 := tmp.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = d.publish(tmp.Name(), filepath.Join(d.dir, name))
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// publish gives a complete file or directory its final name. The directory
// above it is made if it is missing.
func (d *Disk) publish(from, to string) error {
	err := os.Rename(from, to)
	if errors.Is(err, fs.ErrNotExist) {
		if err := mkdirAll(filepath.Dir(to)); err != nil {
			return err
		}
		err = os.Rename(from, to)
	}
	return err
}

// Close ends the use of the volume: leases are given back and unfinished work
// is removed.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.leases {
		f.Close()
	}
	d.leases = map[string]*os.File{}
	if d.session == nil {
		return nil
	}
	err := d.session.end()
	d.session = nil
	return err
}

// hexPath is the path of a file that is named by a digest, below dir.
func (d *Disk) hexPath(dir string, dg digest.Digest) string {
	h := dg.Encoded()
	return filepath.Join(d.dir, dir, h[:2], h)
}

// session is the directory in which a process makes things.
type session struct {
	dir  string
	lock *os.File
}

// workDir returns the directory of this process for what it is about to make.
func (d *Disk) workDir() (*session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil {
		return d.session, nil
	}
	for range 10 {
		var id [8]byte
		rand.Read(id[:])
		s := &session{dir: filepath.Join(d.dir, "work", hex.EncodeToString(id[:]))}
		// The lock comes before the directory: what is not locked is swept.
		lock, err := lockFile(s.dir+".lock", unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.lock = lock
		if err := os.Mkdir(s.dir, 0o755); err != nil {
			lock.Close()
			return nil, err
		}
		d.session = s
		return s, nil
	}
	return nil, fmt.Errorf("cache volume %s: cannot make a directory to work in", d.dir)
}

// end removes the directory.
func (s *session) end() error {
	err := removeAll(s.dir)
	if err == nil {
		err = os.Remove(s.lock.Name())
	}
	s.lock.Close()
	return err
}

// TempDir makes an empty directory on the volume's file system, which goes
// with the Disk's Close at the latest.
func (d *Disk) TempDir(pattern string) (string, error) {
	if d.readOnly {
		return "", ErrReadOnly
	}
	s, err := d.workDir()
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(s.dir, pattern)
}

func (d *Disk) tempFile() (*os.File, error) {
	if d.readOnly {
		return nil, ErrReadOnly
	}
	s, err := d.workDir()
	if err != nil {
		return nil, err
	}
	return os.CreateTemp(s.dir, "file-")
}

// sweep removes what killed processes have left.
func (d *Disk) sweep() {
	locks, _ := filepath.Glob(filepath.Join(d.dir, "work", "*.lock"))
	for _, name := range locks {
		lock, err := lockFile(name, unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue // its owner lives
		}
		if removeAll(strings.TrimSuffix(name, ".lock")) == nil {
			os.Remove(name)
		}
		lock.Close()
	}
}

// lockFile opens the file, which is made if missing, and locks it with flock.
// If the file is removed meanwhile by whoever had it locked, it starts again.
func lockFile(name string, how int) (*os.File, error) {
	for {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, err
		}
		if err := flock(f, how); err != nil {
			f.Close()
			return nil, err
		}
		now, err := os.Stat(name)
		mine, err2 := f.Stat()
		if err == nil && err2 == nil && os.SameFile(now, mine) {
			return f, nil
		}
		f.Close()
	}
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			return err
		}
	}
}

// removeAll is os.RemoveAll for trees whose directories may be closed even to
// their owner, as overlayfs's work directory is.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if e != nil && e.IsDir() {
			os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
