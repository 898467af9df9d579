package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// root is the root file system that init has put together and is in.
type root struct {
	mounted []string // targets of the spec's mounts, in order
	stubs   []string // mount points that were made, in order
}

// enterRoot builds the root in the current mount namespace, which is init's
// own, and makes it the root of this process.
//
// Paths of the machine are opened before the change of root and those inside
// the root are resolved after it, so that no symlink in an image can make init
// touch anything of the machine.
func enterRoot(spec *Spec) (*root, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountOverlay(&spec.Root); err != nil {
		return nil, err
	}
	sources, err := openSources(spec)
	if err != nil {
		return nil, err
	}
	defer sources.close()
	oldRoot, err := changeRoot(spec.Root.MountPoint)
	if err != nil {
		return nil, err
	}
	defer unix.Close(oldRoot)
	if err := mountSystem(sources); err != nil {
		return nil, err
	}
	r := &root{}
	for i, m := range spec.Mounts {
		if err := r.bind(sources.mounts[i], m); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	// Now that nothing is needed of it any more, the machine's own file system
	// goes out of reach.
	if err := unix.Fchdir(oldRoot); err != nil {
		return nil, fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return nil, err
	}
	if spec.Hostname != "" {
		if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
			return nil, fmt.Errorf("set hostname: %w", err)
		}
	}
	return r, nil
}

// changeRoot makes the mount at dir the root, and returns the old one, which
// stays mounted below it until it is detached.
func changeRoot(dir string) (oldRoot int, err error) {
	oldRoot, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Chdir(dir); err != nil {
		return -1, &fs.PathError{Op: "chdir", Path: dir, Err: err}
	}
	// With both arguments the same, the old root is stacked on the new one;
	// see "pivot_root(".", ".")" in pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return -1, fmt.Errorf("pivot_root: %w", err)
	}
	return oldRoot, nil
}

// sources are files of the machine, opened before the change of root.
type sources struct {
	devices map[string]int
	cgroup  int
	sys     int
	mounts  []int
}

var deviceNames = [...]string{"null", "zero", "full", "random", "urandom", "tty"}

func openSources(spec *Spec) (*sources, error) {
	s := &sources{devices: map[string]int{}, cgroup: -1, sys: -1}
	open := func(p string) (int, error) {
		fd, err := unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: p, Err: err}
		}
		return fd, nil
	}
	for _, name := range deviceNames {
		if fd, err := open("/dev/" + name); err == nil {
			s.devices[name] = fd
		}
	}
	if fd, err := open("/sys"); err == nil {
		s.sys = fd
	}
	if fd, err := open("/sys/fs/cgroup"); err == nil {
		s.cgroup = fd
	}
	for _, m := range spec.Mounts {
		fd, err := open(m.Source)
		if err != nil {
			s.close()
			return nil, err
		}
		s.mounts = append(s.mounts, fd)
	}
	return s, nil
}

func (s *sources) close() {
	for _, fd := range s.devices {
		unix.Close(fd)
	}
	for _, fd := range append(s.mounts, s.sys, s.cgroup) {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// fdPath names an open file of this process. It needs /proc.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// bind mounts an open file or directory of the machine on m.Target.
func (r *root) bind(source int, m Mount) error {
	var st unix.Stat_t
	if err := unix.Fstat(source, &st); err != nil {
		return err
	}
	target := path.Join("/", m.Target)
	if err := r.makeTarget(target, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(target) // so that leave finds it, whatever becomes of the links
	if err != nil {
		return err
	}
	if err := unix.Mount(fdPath(source), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	r.mounted = append(r.mounted, target)
	if m.ReadOnly {
		return remount(target, unix.MS_RDONLY)
	}
	return nil
}

// makeTarget makes a mount point where there is none, with the directories
// above it, and remembers what it has made.
func (r *root) makeTarget(target string, isDir bool) error {
	_, err := os.Stat(target)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if link, err := os.Readlink(target); err == nil {
		// A symlink to something that is missing: that is what is made.
		if !path.IsAbs(link) {
			link = path.Join(path.Dir(target), link)
		}
		return r.makeTarget(path.Clean(link), isDir)
	}
	parent := path.Dir(target)
	if err := r.makeTarget(parent, true); err != nil {
		return err
	}
	r.stubs = append(r.stubs, target)
	return keepTimes(parent, func() error {
		if isDir {
			return os.Mkdir(target, 0o755)
		}
		f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	})
}

// keepTimes calls fn, which changes what is in dir, and gives dir its times
// back.
func keepTimes(dir string, fn func() error) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	if err := fn(); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0)
}

// leave takes the spec's mounts away again and removes the mount points that
// were made for them, unless the process has filled them. The times of the
// directories around them become what they were.
func (r *root) leave() error {
	for i := len(r.mounted) - 1; i >= 0; i-- {
		if err := unix.Unmount(r.mounted[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.ENOENT && err != unix.EINVAL {
			return fmt.Errorf("unmount %s: %w", r.mounted[i], err)
		}
	}
	for i := len(r.stubs) - 1; i >= 0; i-- {
		stub := r.stubs[i]
		fi, err := os.Lstat(stub)
		if err != nil || !fi.IsDir() && fi.Size() != 0 {
			continue
		}
		if fi.IsDir() {
			if names, err := os.ReadDir(stub); err != nil || len(names) > 0 {
				continue
			}
		}
		if err := keepTimes(path.Dir(stub), func() error { return os.Remove(stub) }); err != nil {
			return fmt.Errorf("remove mount point: %w", err)
		}
	}
	return nil
}

// remount adds flags to a bind mount and keeps those that it has.
func remount(target string, flags uintptr) error {
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: target, Err: err}
	}
	// The flags of statfs have the values of those of mount, but for RELATIME.
	keep := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY | unix.MS_NOATIME | unix.MS_NODIRATIME)
	if st.Flags&unix.ST_RELATIME != 0 {
		keep |= unix.MS_RELATIME
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags|keep, ""); err != nil {
		return fmt.Errorf("remount %s: %w", target, err)
	}
	return nil
}
