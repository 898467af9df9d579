package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// A Layer names a layer that exists as a blob somewhere.
type Layer struct {
	ocispec.Descriptor
	DiffID digest.Digest
}

// treeMeta is what trees/<name>/meta.json holds.
type treeMeta struct {
	Version int           `json:"version"`
	DiffID  digest.Digest `json:"diffID"`
	// Below is the chain ID of the layers that the tree belongs on top of, ""
	// if it can be used on top of any.
	Below digest.Digest `json:"below,omitempty"`
	// Boot is the boot ID of the machine that has made the tree. Until it is
	// known that all of it is on the disk, and Boot is "", the tree is only
	// good until the machine goes down. So no reader waits for the disk.
	Boot    string `json:"boot,omitempty"`
	Entries int    `json:"entries,omitempty"`
}

const treeVersion = 1

// treeNames returns the names that a tree may have, in the order of
// preference.
func treeNames(diffID, below digest.Digest) [2]string {
	name := diffID.Encoded()
	if below == "" {
		return [2]string{name, name + ".0"}
	}
	return [2]string{name, name + "." + below.Encoded()[:32]}
}

// Tree returns the directory with the unpacked layer, for use on top of the
// layers with the chain ID below, and whether there is one. The tree must not
// be changed. It stays until the Disk is closed: a lease keeps it from
// eviction.
func (d *Disk) Tree(diffID, below digest.Digest) (string, bool) {
	if diffID.Validate() != nil {
		return "", false
	}
	for _, name := range treeNames(diffID, below) {
		dir := filepath.Join(d.dir, "trees", name)
		if d.lease(dir) && d.usable(dir) {
			return filepath.Join(dir, "fs"), true
		}
	}
	return "", false
}

// HasTree reports whether the volume has the layer unpacked, on top of whatever
// layers. It takes no lease.
func (d *Disk) HasTree(diffID digest.Digest) bool {
	if diffID.Validate() != nil {
		return false
	}
	names, _ := filepath.Glob(filepath.Join(d.dir, "trees", diffID.Encoded()+"*"))
	for _, n := range names {
		meta, err := readTreeMeta(n)
		if err == nil && meta.Version == treeVersion && (meta.Boot == "" || meta.Boot == d.bootID) {
			return true
		}
	}
	return false
}

// lease takes a shared lock on the tree's lease file and keeps it. It fails
// if there is no such tree, or if it is just being removed.
func (d *Disk) lease(dir string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.leases[dir]; ok {
		return true
	}
	path := filepath.Join(dir, "lease")
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	if flock(f, unix.LOCK_SH|unix.LOCK_NB) == nil {
		// Still under its name: not moved away before it was locked.
		now, err := os.Stat(path)
		mine, err2 := f.Stat()
		if err == nil && err2 == nil && os.SameFile(now, mine) {
			d.leases[dir] = f
			return true
		}
	}
	f.Close()
	return false
}

func (d *Disk) release(dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f, ok := d.leases[dir]; ok {
		f.Close()
		delete(d.leases, dir)
	}
}

// usable reads what is said about a tree. One that was not yet on the disk
// when the machine went down is removed.
func (d *Disk) usable(dir string) bool {
	meta, err := readTreeMeta(dir)
	if err == nil && meta.Version == treeVersion && (meta.Boot == "" || meta.Boot == d.bootID) {
		return true
	}
	d.release(dir)
	if !d.readOnly {
		d.removeTree(dir)
	}
	return false
}

func readTreeMeta(dir string) (treeMeta, error) {
	var meta treeMeta
	b, err := os.ReadFile(filepath.Join(dir, "meta.json"))
	if err == nil {
		err = json.Unmarshal(b, &meta)
	}
	return meta, err
}

// removeTree removes a tree that nobody holds a lease of: first its name, then
// what is in it.
func (d *Disk) removeTree(dir string) error {
	lease, err := os.Open(filepath.Join(dir, "lease"))
	if err == nil {
		defer lease.Close()
		if err := flock(lease, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	trash, err := d.TempDir("trash-")
	if err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(trash, "tree")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return removeAll(trash)
}

// UnpackRequest says which layer to unpack.
type UnpackRequest struct {
	Layer Layer
	// Below is the chain ID of the layers below, and Lower what they show.
	Below digest.Digest
	Lower snapshot.View
	// Open returns the layer's blob. It is called only if it is needed.
	Open func(context.Context) (io.ReadCloser, error)
	// KeepBlob stores the blob on the volume too, while it is read.
	KeepBlob bool
	// Warn takes what the user should know of an otherwise good tree.
	Warn func(string)
}

// Unpack returns the directory with the unpacked layer as Tree does, and
// unpacks it first if need be. Digest and diff ID are verified. Only one
// process unpacks a layer at a time; the others wait for it.
func (d *Disk) Unpack(ctx context.Context, req UnpackRequest) (string, error) {
	if dir, ok := d.Tree(req.Layer.DiffID, req.Below); ok {
		return dir, nil
	}
	unlock, err := d.lock(ctx, "tree-"+req.Layer.DiffID.Encoded())
	if err != nil {
		return "", err
	}
	defer unlock()
	if dir, ok := d.Tree(req.Layer.DiffID, req.Below); ok {
		return dir, nil
	}
	dir, err := d.TempDir("tree-")
	if err != nil {
		return "", err
	}
	applied, err := d.unpackInto(ctx, dir, &req)
	if err != nil {
		removeAll(dir)
		return "", fmt.Errorf("unpack layer %s: %w", req.Layer.Digest, err)
	}
	if len(applied.Skipped) > 0 && req.Warn != nil {
		req.Warn(fmt.Sprintf("layer %s: left out device nodes that this process may not make: %s", req.Layer.Digest, strings.Join(applied.Skipped, ", ")))
	}
	if err := d.PutTOC(req.Layer.DiffID, applied.TOC); err != nil {
		removeAll(dir)
		return "", err
	}
	name := treeNames(req.Layer.DiffID, req.Below)[0]
	meta := treeMeta{DiffID: req.Layer.DiffID, Entries: applied.TOC.Len()}
	if applied.Dependent {
		name = treeNames(req.Layer.DiffID, req.Below)[1]
		meta.Below = req.Below
	}
	return d.publishTree(dir, name, meta)
}

func (d *Disk) unpackInto(ctx context.Context, dir string, req *UnpackRequest) (*snapshot.Applied, error) {
	blob, err := req.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	var r io.Reader = blob
	var keep *BlobWriter
	if req.KeepBlob && !d.HasBlob(req.Layer.Descriptor) {
		if keep, err = d.NewBlob(); err != nil {
			return nil, err
		}
		defer keep.Abort()
		r = io.TeeReader(blob, keep)
	}
	if err := makeTreeRoot(dir); err != nil {
		return nil, err
	}
	applied, _, err := snapshot.Unpack(ctx, r, req.Layer.Descriptor, req.Layer.DiffID, filepath.Join(dir, "fs"), snapshot.ApplyOptions{Lower: req.Lower})
	if err == nil && keep != nil {
		err = keep.Commit(req.Layer.Digest)
	}
	return applied, err
}

// makeTreeRoot makes the directory of a tree with the root of the layer in it.
func makeTreeRoot(dir string) error {
	for _, p := range []string{dir, filepath.Join(dir, "fs")} {
		if err := os.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(p, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// publishTree gives a finished tree its name and returns its root with a
// lease.
func (d *Disk) publishTree(dir, name string, meta treeMeta) (string, error) {
	meta.Version, meta.Boot = treeVersion, d.bootID
	b, err := json.Marshal(meta)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "meta.json"), b, 0o644); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "lease"), nil, 0o644); err != nil {
		return "", err
	}
	final := filepath.Join(d.dir, "trees", name)
	if err := d.publish(dir, final); err != nil {
		if _, err2 := os.Stat(final); err2 != nil {
			return "", err
		}
		removeAll(dir) // another one was quicker
	}
	if !d.lease(final) {
		return "", fmt.Errorf("tree %s: removed as soon as it was made", name)
	}
	return filepath.Join(final, "fs"), nil
}

// NewTreeDir makes the directory of a tree that a command will fill through an
// overlay mount, and returns the root of the layer in it, to be the upper
// directory.
func (d *Disk) NewTreeDir() (string, error) {
	dir, err := d.TempDir("upper-")
	if err != nil {
		return "", err
	}
	if err := makeTreeRoot(dir); err != nil {
		return "", err
	}
	return filepath.Join(dir, "fs"), nil
}

// AdoptTree publishes a directory from NewTreeDir as the tree of the layer
// with this diff ID. exact says that it holds what the layer does and no more:
// an upper directory can hold more, what was copied up for nothing, and is then
// only for use on top of the very layers that it was made on. The directory
// can be in use as a lower one meanwhile: it moves, but mounts follow it. If
// there is such a tree already, it stays where it is, until the Disk is closed.
func (d *Disk) AdoptTree(root string, diffID, below digest.Digest, exact bool) error {
	names := treeNames(diffID, below)
	meta := treeMeta{DiffID: diffID}
	name := names[0]
	if !exact {
		name, meta.Below = names[1], below
	}
	if _, err := os.Lstat(filepath.Join(d.dir, "trees", name)); err == nil {
		return nil
	}
	_, err := d.publishTree(filepath.Dir(root), name, meta)
	return err
}

// Sync waits until all that has been published is on the disk, and marks the
// trees accordingly, so that they outlive the machine's next start.
func (d *Disk) Sync() error {
	if d.readOnly {
		return nil
	}
	root, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	names, err := filepath.Glob(filepath.Join(d.dir, "trees", "*", "meta.json"))
	if err != nil {
		return err
	}
	var fresh []string
	for _, name := range names {
		if meta, err := readTreeMeta(filepath.Dir(name)); err == nil && meta.Boot == d.bootID {
			fresh = append(fresh, filepath.Dir(name))
		}
	}
	if err := unix.Syncfs(int(root.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", d.dir, err)
	}
	for _, dir := range fresh {
		meta, err := readTreeMeta(dir)
		if err != nil {
			continue // evicted meanwhile
		}
		meta.Boot = ""
		b, err := json.Marshal(meta)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(d.dir, filepath.Join(dir, "meta.json"))
		if err != nil {
			return err
		}
		if err := d.writeFile(rel, b); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
