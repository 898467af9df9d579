package sandbox

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/sys/user"
)

type processUser struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

// lookUpUser finds who spec means in the /etc/passwd and /etc/group of the
// root, in which the caller already is.
func lookUpUser(spec string) (*processUser, error) {
	const passwd, group = "/etc/passwd", "/etc/group"
	if spec == "" {
		spec = "0"
	}
	u, err := user.GetExecUserPath(spec, nil, passwd, group)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", spec, err)
	}
	p := &processUser{uid: uint32(u.Uid), gid: uint32(u.Gid), home: u.Home}
	for _, g := range u.Sgids {
		p.groups = append(p.groups, uint32(g))
	}
	if p.home == "" {
		p.home = "/"
	}
	if !slices.Contains(p.groups, p.gid) {
		p.groups = append(p.groups, p.gid)
	}
	return p, nil
}

// withHome adds HOME to an environment that lacks it.
func withHome(env []string, home string) []string {
	for _, kv := range env {
		if strings.HasPrefix(kv, "HOME=") {
			return env
		}
	}
	return append(slices.Clone(env), "HOME="+home)
}

// makeDir makes the directory and those above it as far as they are missing,
// owned by the given user.
func makeDir(dir string, uid, gid uint32) error {
	if dir == "" {
		return nil
	}
	if fi, err := os.Stat(dir); err == nil {
		if !fi.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
		return nil
	}
	if parent := path.Dir(dir); parent != dir {
		if err := makeDir(parent, uid, gid); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.Lchown(dir, int(uid), int(gid))
}
