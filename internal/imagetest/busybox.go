package imagetest

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Busybox returns the path of the machine's static busybox, and skips the test
// where there is none: on Debian it is in the package busybox-static, which
// make test installs.
func Busybox(t testing.TB) string {
	t.Helper()
	for _, p := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		if isStatic(p) {
			return p
		}
	}
	t.Skip("needs a static busybox: install busybox-static")
	return ""
}

// isStatic reports whether the file is a program that needs no libraries.
func isStatic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// BusyboxTree returns a fresh directory with a small root file system: busybox
// with links for all its applets, and a few users.
func BusyboxTree(t testing.TB) string {
	t.Helper()
	busybox := Busybox(t)
	dir := t.TempDir()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin", "etc", "tmp", "root", "mnt", "proc", "dev", "sys", "home", "home/worker"} {
		must(os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	must(os.Chmod(filepath.Join(dir, "tmp"), 0o1777))
	b, err := os.ReadFile(busybox)
	must(err)
	must(os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755))
	applets, err := exec.Command(busybox, "--list").Output()
	must(err)
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			must(os.Symlink("busybox", filepath.Join(dir, "bin", a)))
		}
	}
	must(os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\nworker:x:1000:100::/home/worker:/bin/sh\n"), 0o644))
	must(os.WriteFile(filepath.Join(dir, "etc/group"), []byte("root:x:0:\nusers:x:100:\nstaff:x:20:worker\n"), 0o644))
	must(os.Symlink("/not/there/yet", filepath.Join(dir, "link")))
	return dir
}
