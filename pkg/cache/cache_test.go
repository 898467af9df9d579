package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/cache/cachetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

func openDisk(t *testing.T, dir string) *cache.Disk {
	t.Helper()
	d, err := cache.OpenDisk(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func newClient(t *testing.T) *registry.Client {
	t.Helper()
	c, err := registry.NewClient(registry.Options{Keychain: imagetest.NoCredentials(), Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTables(t *testing.T) {
	t.Run("disk", func(t *testing.T) {
		dir := t.TempDir()
		cachetest.Table(t,
			func(t *testing.T) cache.Table { return openDisk(t, dir).Entries("scope") },
			func(t *testing.T, content string) {
				if err := openDisk(t, dir).WriteBlob([]byte(content)); err != nil {
					t.Fatal(err)
				}
			})
	})
	t.Run("registry", func(t *testing.T) {
		reg := imagetest.NewRegistry(t)
		repo := registry.Repository{Host: reg.Host, Path: "app/cache"}
		cachetest.Table(t,
			func(t *testing.T) cache.Table {
				return cache.NewRemote(cache.RegistryStore(newClient(t), repo), cache.RemoteOptions{Shard: "s"})
			},
			func(t *testing.T, content string) { pushBlob(t, cache.RegistryStore(newClient(t), repo), content) })
	})
	t.Run("layout", func(t *testing.T) {
		dir := t.TempDir()
		open := func(t *testing.T) cache.RemoteStore {
			l, err := registry.CreateLayout(dir)
			if err != nil {
				t.Fatal(err)
			}
			return cache.LayoutStore(l)
		}
		cachetest.Table(t,
			func(t *testing.T) cache.Table { return cache.NewRemote(open(t), cache.RemoteOptions{Shard: "s"}) },
			func(t *testing.T, content string) { pushBlob(t, open(t), content) })
	})
}

func pushBlob(t *testing.T, s cache.RemoteStore, content string) {
	t.Helper()
	_, err := s.PushBlob(t.Context(), registry.Blob{
		Descriptor: ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))},
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(content)), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRecipeFraming checks that no two recipes have the same key because their
// parts run together.
func TestRecipeFraming(t *testing.T) {
	seen := map[cache.Key]string{}
	for _, parts := range [][]string{
		{"a", "bc"}, {"ab", "c"}, {"abc", ""}, {"", "abc"}, {"a", "b", "c", ""}, {"a", "b", "", "c"}, {"a", "", "b", "c"},
		{"a-b", "c"}, {"a", "b-c"}, {"x", "1", "y", "2"}, {"y", "2", "x", "1"}, {},
	} {
		r := cache.Recipe{}
		for i := 0; i+1 < len(parts); i += 2 {
			r.Add(parts[i], parts[i+1])
		}
		if len(parts) == 0 {
			seen[r.Key()] = "nothing"
			continue
		}
		id := fmt.Sprintf("%q", parts)
		if other, ok := seen[r.Key()]; ok {
			t.Errorf("%s and %s have the same key", id, other)
		}
		seen[r.Key()] = id
	}
}

func TestKeyText(t *testing.T) {
	k := cachetest.Entry("a", "").Key
	text, _ := k.MarshalText()
	var back cache.Key
	if err := back.UnmarshalText(text); err != nil || back != k {
		t.Errorf("%s came back as %s, %v", k, back, err)
	}
	for _, bad := range []string{"", "12", strings.Repeat("x", 64), string(text) + "00"} {
		if err := back.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was read as a key", bad)
		}
	}
}

func TestOpenDisk(t *testing.T) {
	dir := t.TempDir()
	openDisk(t, dir)
	openDisk(t, dir) // several at a time
	if err := os.Remove(filepath.Join(dir, "VERSION")); err != nil {
		t.Fatal(err)
	}
	openDisk(t, dir) // whoever was to write it was killed
	os.Chmod(filepath.Join(dir, "VERSION"), 0o644)
	if err := os.WriteFile(filepath.Join(dir, "VERSION"), []byte("ondol volume 99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.OpenDisk(dir); err == nil || !strings.Contains(err.Error(), "ondol volume 99") || !strings.Contains(err.Error(), dir) {
		t.Errorf("a volume of another version: %v", err)
	}
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := cache.OpenDisk(other); err == nil || !strings.Contains(err.Error(), "precious") {
		t.Errorf("a directory with something else in it: %v", err)
	}
	if _, err := cache.OpenDisk(filepath.Join(other, "precious")); err == nil {
		t.Error("a file was opened as a volume")
	}
}

// TestSweep checks that what a killed process has left is removed by the next
// one, and what a living one works on is not.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	alive := openDisk(t, dir)
	kept, err := alive.TempDir("x-")
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "work", "dead")
	if err := os.MkdirAll(filepath.Join(dead, "work", "closed"), 0o000); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dead+".lock", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	openDisk(t, dir)
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("a living process has lost its directory: %v", err)
	}
	for _, p := range []string{dead, dead + ".lock"} {
		if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was left", p)
		}
	}
	alive.Close()
	names, _ := os.ReadDir(filepath.Join(dir, "work"))
	for _, n := range names {
		if !strings.HasSuffix(n.Name(), ".lock") {
			t.Errorf("Close has left %s", n.Name())
		}
	}
}

func TestBlobs(t *testing.T) {
	dir := t.TempDir()
	d := openDisk(t, dir)
	content := []byte("blob")
	desc := ocispec.Descriptor{Digest: digest.FromBytes(content), Size: 4}
	if d.HasBlob(desc) {
		t.Error("the volume has what it was never given")
	}
	w, err := d.NewBlob()
	if err != nil {
		t.Fatal(err)
	}
	w.Write(content)
	if err := w.Commit(digest.FromString("other")); !errors.Is(err, snapshot.ErrDigest) {
		t.Errorf("commit of the wrong content: %v", err)
	}
	w.Abort()
	if err := d.WriteBlob(content); err != nil {
		t.Fatal(err)
	}
	if b, err := d.ReadBlob(desc, 100); err != nil || string(b) != "blob" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := d.ReadBlob(desc, 3); err == nil {
		t.Error("a blob over the limit was read")
	}
	path := filepath.Join(dir, "blobs/sha256", desc.Digest.Encoded()[:2], desc.Digest.Encoded())
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// Damage that keeps the size is found when the blob is read; other damage
	// before.
	os.Chmod(path, 0o644)
	os.WriteFile(path, []byte("BLOB"), 0o644)
	if _, err := d.ReadBlob(desc, 100); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("damaged blob: %v", err)
	}
	if d.HasBlob(desc) {
		t.Error("a damaged blob stayed")
	}
	os.WriteFile(path, []byte("BL"), 0o644)
	if d.HasBlob(desc) {
		t.Error("a blob that was cut off counts as there")
	}
	if _, err := d.OpenBlob(desc); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("cut off blob: %v", err)
	}
	names, _ := filepath.Glob(filepath.Join(dir, "work", "*", "*"))
	if len(names) != 0 {
		t.Errorf("unfinished files: %v", names)
	}
}

// TestFetchOnce checks that several who want a blob at the same time fetch it
// once, also across processes, which separate Disks stand for.
func TestFetchOnce(t *testing.T) {
	dir := t.TempDir()
	content := "shared"
	desc := ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))}
	var opened atomic.Int32
	var wg sync.WaitGroup
	for range 5 {
		d := openDisk(t, dir)
		wg.Go(func() {
			err := d.Fetch(t.Context(), desc, func(context.Context) (io.ReadCloser, error) {
				opened.Add(1)
				time.Sleep(20 * time.Millisecond)
				return io.NopCloser(strings.NewReader(content)), nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := opened.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	other := ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}
	err := openDisk(t, dir).Fetch(t.Context(), other, func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader("y")), nil
	})
	if !errors.Is(err, snapshot.ErrDigest) {
		t.Errorf("wrong content: %v", err)
	}
}

// layerOf packs entries as a layer.
func layerOf(entries ...imagetest.Entry) (cache.Layer, []byte) {
	plain := imagetest.Tar(entries...)
	blob := imagetest.Gzip(plain)
	return cache.Layer{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))},
		DiffID:     digest.FromBytes(plain),
	}, blob
}

func request(l cache.Layer, blob []byte) cache.UnpackRequest {
	return cache.UnpackRequest{Layer: l, Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(blob)), nil
	}}
}

func TestTrees(t *testing.T) {
	imagetest.NeedRoot(t)
	dir := t.TempDir()
	d := openDisk(t, dir)
	l, blob := layerOf(imagetest.Dir("d"), imagetest.File("d/f", "x"))
	if _, ok := d.Tree(l.DiffID, ""); ok {
		t.Error("the volume has a tree that was never made")
	}
	root, err := d.Unpack(t.Context(), request(l, blob))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "d/f")); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	never := cache.UnpackRequest{Layer: l, Open: func(context.Context) (io.ReadCloser, error) { return nil, errors.New("opened again") }}
	if again, err := openDisk(t, dir).Unpack(t.Context(), never); err != nil || again != root {
		t.Errorf("second time: %s, %v", again, err)
	}
	if toc, err := d.TOC(l.DiffID); err != nil || toc.Len() != 2 {
		t.Errorf("table of contents: %v", err)
	}
	if d.HasBlob(l.Descriptor) {
		t.Error("the blob was kept without being asked to")
	}
	keep := request(cache.Layer{}, nil)
	keep.Layer, blob = layerOf(imagetest.File("g", "y"))
	keep = request(keep.Layer, blob)
	keep.KeepBlob = true
	if _, err := d.Unpack(t.Context(), keep); err != nil || !d.HasBlob(keep.Layer.Descriptor) {
		t.Errorf("the blob was not kept: %v", err)
	}
	// A layer that passes through directories belongs on top of others.
	dep, blob := layerOf(imagetest.File("d/g", "y"))
	req := request(dep, blob)
	req.Below, req.Lower = l.DiffID, snapshot.NewTreeView([]string{root})
	onL, err := d.Unpack(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := d.Tree(dep.DiffID, digest.FromString("other")); ok {
		t.Error("a dependent tree is offered for other layers")
	}
	if again, ok := d.Tree(dep.DiffID, l.DiffID); !ok || again != onL {
		t.Errorf("dependent tree: %s, %v", again, ok)
	}
	wrong := request(l, blob)
	wrong.Layer.DiffID = digest.FromString("other")
	if _, err := d.Unpack(t.Context(), wrong); !errors.Is(err, snapshot.ErrDigest) {
		t.Errorf("wrong blob: %v", err)
	}
	names, _ := filepath.Glob(filepath.Join(dir, "work", "*", "*"))
	if len(names) != 0 {
		t.Errorf("unfinished trees: %v", names)
	}
}

// TestTreesAfterCrash checks that trees which may not have reached the disk do
// not outlive the machine, and that others do.
func TestTreesAfterCrash(t *testing.T) {
	imagetest.NeedRoot(t)
	dir := t.TempDir()
	reboot := func() {
		metas, _ := filepath.Glob(filepath.Join(dir, "trees", "*", "meta.json"))
		for _, m := range metas {
			b, err := os.ReadFile(m)
			if err != nil {
				t.Fatal(err)
			}
			boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
			if err != nil {
				t.Fatal(err)
			}
			os.Chmod(m, 0o644)
			b = bytes.ReplaceAll(b, bytes.TrimSpace(boot), []byte("another-boot"))
			if err := os.WriteFile(m, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	l, blob := layerOf(imagetest.File("f", "x"))
	d := openDisk(t, dir)
	if _, err := d.Unpack(t.Context(), request(l, blob)); err != nil {
		t.Fatal(err)
	}
	d.Close()
	reboot()
	d = openDisk(t, dir)
	if _, ok := d.Tree(l.DiffID, ""); ok {
		t.Error("a tree that was never synced is used after a crash")
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "trees")); len(left) != 0 {
		t.Errorf("it was left: %v", left)
	}
	if _, err := d.Unpack(t.Context(), request(l, blob)); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	d.Close()
	reboot()
	if _, ok := openDisk(t, dir).Tree(l.DiffID, ""); !ok {
		t.Error("a tree that was synced is not used after a crash")
	}
}

func TestReadOnly(t *testing.T) {
	imagetest.PrivateMounts(t)
	dir := t.TempDir()
	l, blob := layerOf(imagetest.File("f", "x"))
	d := openDisk(t, dir)
	if _, err := d.Unpack(t.Context(), request(l, blob)); err != nil {
		t.Fatal(err)
	}
	ro := t.TempDir()
	for _, args := range [][]string{{"--bind", dir, ro}, {"-o", "remount,ro,bind", ro}} {
		if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	defer exec.Command("umount", ro).Run()
	r, err := cache.OpenDisk(ro)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.ReadOnly() {
		t.Fatal("the volume is not read-only")
	}
	if _, ok := r.Tree(l.DiffID, ""); !ok {
		t.Error("the tree cannot be had read-only")
	}
	if err := r.WriteBlob([]byte("x")); !errors.Is(err, cache.ErrReadOnly) {
		t.Errorf("writing: %v", err)
	}
}

func TestRefs(t *testing.T) {
	d := openDisk(t, t.TempDir())
	if _, err := d.Ref("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unknown name: %v", err)
	}
	want := cache.Ref{Name: "docker.io/library/a:latest", Target: ocispec.Descriptor{Digest: digest.FromString("m"), Size: 1}, From: "here"}
	for _, r := range []cache.Ref{{Name: "b", Target: want.Target}, want} {
		if err := d.PutRef(r); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := d.Ref(want.Name); err != nil || got.Target.Digest != want.Target.Digest || got.From != "here" {
		t.Errorf("%+v, %v", got, err)
	}
	all, err := d.Refs()
	if err != nil || len(all) != 2 || all[0].Name != "b" {
		t.Errorf("%+v, %v", all, err)
	}
	if time.Since(d.LastUse(want.Name)) > time.Minute {
		t.Error("the last use is not now")
	}
}

// TestRemoteDamage checks that whatever stands where the table should be is a
// miss, and that one that cannot be reached is not.
func TestRemoteDamage(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	client := newClient(t)
	repo := registry.Repository{Host: reg.Host, Path: "c"}
	store := cache.RegistryStore(client, repo)
	e := cachetest.Entry("a", "content")
	pushBlob(t, store, "content")
	fresh := func() *cache.Remote { return cache.NewRemote(store, cache.RemoteOptions{}) }
	if err := fresh().Store(t.Context(), []cache.Entry{e}); err != nil {
		t.Fatal(err)
	}
	tag := registry.Reference{Repository: repo, Tag: fresh().Tag()}
	_, good, err := client.Manifest(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string][]byte{
		"not JSON":        []byte("x"),
		"another type":    bytes.Replace(good, []byte("cache.table.v1"), []byte("cache.table.v9"), 1),
		"cut table":       bytes.Replace(good, []byte(`"data":"`), []byte(`"data":"AAAA`), 1),
		"wrong blob size": bytes.Replace(good, []byte(`"data"`), []byte(`"dada"`), 1),
	} {
		if err := client.PushManifest(t.Context(), tag, ocispec.MediaTypeImageManifest, m); err != nil {
			t.Fatal(err)
		}
		got, err := fresh().Lookup(t.Context(), []cache.Key{e.Key})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(got); n != 0 && name != "wrong blob size" {
			t.Errorf("%s: found %v", name, got)
		}
	}
	reg.Add(imagetest.Fail(100, 500))
	if _, err := fresh().Lookup(t.Context(), []cache.Key{e.Key}); err == nil {
		t.Error("a registry that fails is taken for an empty table")
	}
}

// TestRemoteRequests counts what the table costs: two round trips at most to
// read it, however many keys are asked for.
func TestRemoteRequests(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	store := cache.RegistryStore(newClient(t), registry.Repository{Host: reg.Host, Path: "c"})
	var entries []cache.Entry
	var keys []cache.Key
	pushBlob(t, store, "content")
	for i := range 200 {
		e := cachetest.Entry(fmt.Sprint(i), "content")
		entries, keys = append(entries, e), append(keys, e.Key)
	}
	reg.Requests()
	r := cache.NewRemote(store, cache.RemoteOptions{})
	if err := r.Store(t.Context(), entries); err != nil {
		t.Fatal(err)
	}
	reg.Requests()
	r = cache.NewRemote(store, cache.RemoteOptions{})
	for range 3 {
		if got, err := r.Lookup(t.Context(), keys); err != nil || len(got) != 200 {
			t.Fatalf("%d, %v", len(got), err)
		}
	}
	if got := reg.Requests(); len(got) != 1 {
		t.Errorf("requests: %q", got)
	}
	// A build that has found all it wanted writes nothing.
	if err := r.Update(t.Context(), nil, keys); err != nil || len(reg.Requests()) != 0 {
		t.Errorf("a fresh table was written: %v", err)
	}
}
