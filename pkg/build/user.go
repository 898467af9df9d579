package build

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/user"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// owner is the numeric owner of files.
type owner struct{ uid, gid uint32 }

// maxUserFile bounds what is read of a /etc/passwd or /etc/group.
const maxUserFile = 10 << 20

// lookUpOwner returns the owner that spec, "user[:group]", means, by the
// /etc/passwd and /etc/group of a view. A user's number alone is the group's
// too, a user's name alone brings its primary group, and names that are not
// known mean root: that is what other builders make of them.
func lookUpOwner(ctx context.Context, v snapshot.View, spec string) (owner, error) {
	if spec == "" {
		return owner{}, nil
	}
	var o owner
	userPart, groupPart, hasGroup := strings.Cut(spec, ":")
	if n, ok := parseID(userPart); ok {
		o = owner{n, n}
	} else if userPart != "" {
		content, err := userFile(ctx, v, "etc/passwd")
		if err != nil {
			return owner{}, err
		}
		users, err := user.ParsePasswdFilter(bytes.NewReader(content), func(u user.User) bool { return u.Name == userPart })
		if err != nil {
			return owner{}, err
		}
		if len(users) > 0 {
			o = owner{uint32(users[0].Uid), uint32(users[0].Gid)}
		}
	}
	if !hasGroup || groupPart == "" {
		return o, nil
	}
	if n, ok := parseID(groupPart); ok {
		o.gid = n
		return o, nil
	}
	content, err := userFile(ctx, v, "etc/group")
	if err != nil {
		return owner{}, err
	}
	groups, err := user.ParseGroupFilter(bytes.NewReader(content), func(g user.Group) bool { return g.Name == groupPart })
	if err != nil {
		return owner{}, err
	}
	if len(groups) > 0 {
		o.gid = uint32(groups[0].Gid)
	}
	return o, nil
}

// parseID reads a numeric user or group. "root" is 0 even without a file that
// says so.
func parseID(s string) (uint32, bool) {
	if s == "root" {
		return 0, true
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil
}

// userFile reads a user database, which may be missing.
func userFile(ctx context.Context, v snapshot.View, path string) ([]byte, error) {
	b, err := snapshot.ReadFile(ctx, v, path, maxUserFile)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	return b, err
}
