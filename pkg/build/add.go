package build

import (
	"context"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// dispatchAdd copies files from the build context as COPY does, and unpacks
// those that are archives.
func (d *dispatcher) dispatchAdd(c *instructions.AddCommand) error {
	for _, src := range c.SourcePaths {
		if ref, isGit, err := dfgitutil.ParseGitRef(src); err == nil && !ref.IndistinguishableFromLocal || isGit {
			return notYet("ADD of a git repository (" + src + ")")
		}
		if strings.HasPrefix(src, "http://") || strings.HasPrefix(src, "https://") {
			return notYet("ADD of a URL (" + src + ")")
		}
	}
	if c.Checksum != "" {
		return notYet("ADD --checksum")
	}
	if c.KeepGitDir != nil {
		return notYet("ADD --keep-git-dir")
	}
	o := &copyOp{name: "ADD", chown: c.Chown, chmod: c.Chmod, link: c.Link, exclude: c.ExcludePatterns, unpack: true}
	if c.Unpack != nil {
		o.unpack = *c.Unpack
	}
	return d.addCopy(o, c.SourcesAndDest, c.String())
}

// unpackArchive unpacks a file into the directory dest if it is an archive,
// and reports whether it is.
func (c *copier) unpackArchive(ctx context.Context, e *execution, v snapshot.View, file snapshot.Entry, dest string) (bool, error) {
	a, err := openArchive(ctx, e.solver.b.opts.Volume, v, file.Path)
	if err != nil || a == nil {
		return false, err
	}
	path, err := snapshot.Resolve(c.draft, dest, true)
	if err != nil {
		return true, err
	}
	if err := makeDirs(c.draft, path, 0o755, c.dirOwner(), c.now); err != nil {
		return true, err
	}
	return true, a.unpack(c.draft, path, c.owner, c.now)
}
