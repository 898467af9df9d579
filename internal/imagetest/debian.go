package imagetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// debianOnce makes sure that tests of one process do not make the same file.
var debianOnce sync.Mutex

// DebianTar returns the path of a tar with a minimal Debian root file system,
// of the release and from the mirror that this machine uses itself. It is made
// with debootstrap, which takes half a minute, and kept in the user's cache
// directory.
func DebianTar() (string, error) {
	debianOnce.Lock()
	defer debianOnce.Unlock()
	mirror, release, err := debianMirror()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	tar := filepath.Join(cache, "ondol-test", "debian-"+release+".tar")
	if _, err := os.Stat(tar); err == nil {
		return tar, nil
	}
	if err := os.MkdirAll(filepath.Dir(tar), 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "debian-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	unfinished := fmt.Sprintf("%s.%d", tar, os.Getpid())
	defer os.Remove(unfinished)
	for _, args := range [][]string{
		{"debootstrap", "--variant=minbase", release, dir, mirror},
		// Without what the machine's own device nodes are needed for.
		{"tar", "-C", dir, "--exclude=./dev/*", "--exclude=./var/cache/apt/archives/*.deb", "-cf", unfinished, "."},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return tar, os.Rename(unfinished, tar)
}

// debianMirror asks apt for its first source.
func debianMirror() (mirror, release string, err error) {
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages").Output()
	if err != nil {
		return "", "", fmt.Errorf("ask apt for its sources: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		uri, codename, _ := strings.Cut(strings.TrimSpace(line), " ")
		if strings.Contains(uri, "debian") && !strings.Contains(uri, "security") && !strings.Contains(codename, "-") {
			return uri, codename, nil
		}
	}
	return "", "", fmt.Errorf("apt has no source of Debian:\n%s", out)
}
