package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountOverlay mounts the root at its mount point.
//
// volatile: without it, every file that is copied up is synced, which makes
// chown -R over a 1.2 GB tree take 50 s instead of 7. userxattr: the one form
// of marks that works for every kind of root. Both are measured in
// docs/performance.md.
func mountOverlay(r *Rootfs) error {
	if len(r.Lower) == 0 {
		// Nothing to lay over: the changes are the root.
		if err := unix.Mount(r.Upper, r.MountPoint, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount root file system: bind %s: %w", r.Upper, err)
		}
		return nil
	}
	err := mountOverlayByFD(r)
	if errors.Is(err, errors.ErrUnsupported) {
		err = mountOverlayByOptions(r)
	}
	if err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	return nil
}

// mountOverlayByFD uses the mount API of Linux 5.2 and overlayfs's lowerdir+
// of 6.5: it takes 500 lower directories of any name. It fails with
// errors.ErrUnsupported where these are not available.
func mountOverlayByFD(r *Rootfs) error {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen: %w: %w", errors.ErrUnsupported, err)
	}
	defer unix.Close(fsfd)
	for _, dir := range r.Lower {
		if err := unix.FsconfigSetString(fsfd, "lowerdir+", dir); err != nil {
			return fmt.Errorf("lowerdir+ %s: %w: %w", dir, errors.ErrUnsupported, err)
		}
	}
	for _, kv := range [][2]string{{"upperdir", r.Upper}, {"workdir", r.Work}} {
		if err := unix.FsconfigSetString(fsfd, kv[0], kv[1]); err != nil {
			return fmt.Errorf("%s %s: %w", kv[0], kv[1], err)
		}
	}
	for _, flag := range []string{"userxattr", "volatile"} {
		if err := unix.FsconfigSetFlag(fsfd, flag); err != nil {
			return fmt.Errorf("%s: %w: %w", flag, errors.ErrUnsupported, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return fmt.Errorf("overlay on %s: %w%s", r.Upper, err, kernelSays(fsfd))
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, r.MountPoint, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount to %s: %w", r.MountPoint, err)
	}
	return nil
}

// kernelSays returns the messages that the kernel has left in the context.
func kernelSays(fsfd int) string {
	var out []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fsfd, buf)
		if err != nil || n <= 0 {
			break
		}
		out = append(out, strings.TrimSpace(string(buf[:n])))
	}
	if len(out) == 0 {
		return ""
	}
	return " (" + strings.Join(out, "; ") + ")"
}

// mountOverlayByOptions uses mount(2). All options must fit one page, so the
// lower directories go by short names: symlinks in a directory that the
// process changes to.
func mountOverlayByOptions(r *Rootfs) error {
	links, err := os.MkdirTemp(filepath.Dir(r.MountPoint), "lower-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(links)
	var names []string
	all := append([]string{r.Upper, r.Work, r.MountPoint}, r.Lower...)
	for i, dir := range all {
		name := strconv.Itoa(i)
		if err := os.Symlink(dir, filepath.Join(links, name)); err != nil {
			return err
		}
		names = append(names, name)
	}
	if err := unix.Chdir(links); err != nil {
		return &fs.PathError{Op: "chdir", Path: links, Err: err}
	}
	defer unix.Chdir("/")
	options := "lowerdir=" + strings.Join(names[3:], ":") + ",upperdir=0,workdir=1,userxattr,volatile"
	if err := unix.Mount("overlay", "2", "overlay", 0, options); err != nil {
		return fmt.Errorf("overlay on %s: %w", r.Upper, err)
	}
	return nil
}

// mountSystem gives the root its /proc, /sys and /dev. It is called after the
// change of root, so that all these paths lie in the image.
func mountSystem(s *sources) error {
	const hardened = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", hardened, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := mountSys(s, hardened); err != nil {
		return err
	}
	if err := mountDev(s); err != nil {
		return err
	}
	return maskSystem()
}

func mountSys(s *sources, flags uintptr) error {
	err := unix.Mount("sysfs", "/sys", "sysfs", flags|unix.MS_RDONLY, "")
	if err != nil && s.sys >= 0 {
		// The network namespace is not ours: take the machine's.
		if err = unix.Mount(fdPath(s.sys), "/sys", "", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			return remount("/sys", flags|unix.MS_RDONLY)
		}
	}
	if err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if s.cgroup < 0 {
		return nil
	}
	// Runtimes read their limits there. It is not worth failing for.
	if unix.Mount(fdPath(s.cgroup), "/sys/fs/cgroup", "", unix.MS_BIND|unix.MS_REC, "") == nil {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/sys/fs/cgroup", unix.AT_RECURSIVE, &attr); err != nil {
			return unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH) // not writable, or not at all
		}
	}
	return nil
}

func mountDev(s *sources) error {
	if err := unix.Mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID|unix.MS_STRICTATIME, "mode=755,size=65536k"); err != nil {
		return fmt.Errorf("mount /dev: %w", err)
	}
	for name, fd := range s.devices {
		target := "/dev/" + name
		f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
		if err != nil {
			return err
		}
		f.Close()
		if err := unix.Mount(fdPath(fd), target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", target, err)
		}
	}
	for _, m := range []struct {
		dir, fstype, options string
		flags                uintptr
	}{
		{"/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"/dev/shm", "tmpfs", "mode=1777,size=65536k", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/dev/mqueue", "mqueue", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := os.Mkdir(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0",
		"stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// What container engines hide of /proc and /sys, and what they make
// read-only, since it belongs to the machine and not to the process.
var (
	maskedPaths = [...]string{
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readOnlyPaths = [...]string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

func maskSystem() error {
	for _, p := range maskedPaths {
		fi, err := os.Lstat(p)
		if err != nil {
			continue // this kernel does not have it
		}
		if fi.IsDir() {
			err = unix.Mount("tmpfs", p, "tmpfs", unix.MS_RDONLY, "size=0k")
		} else {
			err = unix.Mount("/dev/null", p, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("mask %s: %w", p, err)
		}
	}
	for _, p := range readOnlyPaths {
		if _, err := os.Lstat(p); err != nil {
			continue
		}
		if err := unix.Mount(p, p, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", p, err)
		}
		if err := remount(p, unix.MS_RDONLY); err != nil {
			return err
		}
	}
	return nil
}
