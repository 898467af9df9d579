package catalog

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/imagetest"
)

func open(t *testing.T, dir string) (*Catalog, *strings.Builder) {
	t.Helper()
	var log strings.Builder
	c, err := Open(dir, func(f string, a ...any) { fmt.Fprintf(&log, f+"\n", a...) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, &log
}

func record(name string) Record {
	return Record{
		Name: name, Digest: digest.FromString(name), Layers: 2, Size: 1 << 40, Unpacked: 1, From: "registry",
		Warmed: time.Unix(1_700_000_000, 0).UTC(), LastUse: time.Unix(1_700_001_000, 0).UTC(),
	}
}

func all(t *testing.T, c *Catalog) []Record {
	t.Helper()
	out, err := c.All()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCatalog(t *testing.T) {
	dir := t.TempDir()
	c, _ := open(t, dir)
	if err := c.Put(record("b"), record("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("opened twice: %v", err)
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Fatal(err)
	}
	if err := c.Put(record("c")); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	c, log := open(t, dir)
	got := all(t, c)
	if len(got) != 2 || got[0] != record("a") || got[1] != record("b") {
		t.Errorf("after opening again: %+v\n%s", got, log)
	}
	if err := errors.Join(c.Delete("a"), c.Delete("never")); err != nil {
		t.Fatal(err)
	}
	if got := all(t, c); len(got) != 1 {
		t.Errorf("after deletion: %+v", got)
	}
}

func TestReconcile(t *testing.T) {
	c, _ := open(t, t.TempDir())
	used := record("used")
	used.LastUse = used.LastUse.Add(time.Hour)
	if err := c.Put(record("gone"), used, record("moved")); err != nil {
		t.Fatal(err)
	}
	moved := record("moved")
	moved.Digest, moved.LastUse = digest.FromString("new"), time.Unix(1, 0).UTC()
	if err := c.Reconcile([]Record{record("new"), record("used"), moved}); err != nil {
		t.Fatal(err)
	}
	got := all(t, c)
	if len(got) != 3 || got[0] != moved || got[1] != record("new") || got[2] != used {
		t.Errorf("%+v", got)
	}
}

// TestDamage damages the files of a catalog in all the ways in which that has
// been seen. Whatever it is, the next Open works, and what it cannot save is
// gone and not wrong.
func TestDamage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, state string)
		kept   bool
	}{
		{"none", func(*testing.T, string) {}, true},
		{"manifest cut off", func(t *testing.T, s string) { truncate(t, s+"/MANIFEST", 10) }, false},
		{"manifest gone", func(t *testing.T, s string) { remove(t, s+"/MANIFEST") }, false},
		{"table gone", func(t *testing.T, s string) { remove(t, s+"/*.sst") }, false},
		{"table empty", func(t *testing.T, s string) { truncate(t, s+"/*.sst", 0) }, false},
		{"table flipped", func(t *testing.T, s string) { flip(t, s+"/*.sst", 60) }, false},
		{"empty memory table", func(t *testing.T, s string) { write(t, s+"/00009.mem", "") }, true},
		{"empty value log", func(t *testing.T, s string) { write(t, s+"/000009.vlog", "") }, true},
		{"garbage", func(t *testing.T, s string) { write(t, s+"/MANIFEST", "garbage garbage garbage") }, false},
		{"last one did not open", func(t *testing.T, s string) { write(t, s+".opening", "") }, false},
		{"lock left", func(t *testing.T, s string) { write(t, s+"/LOCK", "1\n") }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c, _ := open(t, dir)
			if err := c.Put(record("a")); err != nil {
				t.Fatal(err)
			}
			c.Close()
			tt.damage(t, filepath.Join(dir, "state"))
			c, log := open(t, dir)
			got := all(t, c)
			if tt.kept && (len(got) != 1 || got[0] != record("a")) || !tt.kept && len(got) != 0 && got[0] != record("a") {
				t.Errorf("records: %+v\n%s", got, log)
			}
			if err := c.Put(record("b")); err != nil {
				t.Errorf("writing afterwards: %v", err)
			}
		})
	}
}

func files(t *testing.T, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("nothing to damage at %s", pattern)
	}
	return names
}

func truncate(t *testing.T, pattern string, n int64) {
	for _, f := range files(t, pattern) {
		if err := os.Truncate(f, n); err != nil {
			t.Fatal(err)
		}
	}
}

func remove(t *testing.T, pattern string) {
	for _, f := range files(t, pattern) {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
}

func flip(t *testing.T, pattern string, at int) {
	for _, f := range files(t, pattern) {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b[at] ^= 0xff
		write(t, f, string(b))
	}
}

func write(t *testing.T, name, content string) {
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFullDisk checks that there is no catalog on a disk without room for it,
// and that an open one is closed before the disk is full.
func TestFullDisk(t *testing.T) {
	if imagetest.Isolated(t) {
		return
	}
	disk := func(size string) string {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		return dir
	}
	small := disk("100m")
	if _, err := Open(small, nil); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "free") {
		t.Errorf("with 100 MB: %v", err)
	}
	large := disk("700m")
	c, log := open(t, large)
	if err := c.Put(record("a")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(large, "ballast"), strings.Repeat("x", 500<<20))
	for deadline := time.Now().Add(4 * checkEvery); ; {
		if _, err := c.All(); errors.Is(err, ErrClosed) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the catalog is still open")
		}
		time.Sleep(50 * time.Millisecond)
	}
	if !strings.Contains(log.String(), "nearly full") {
		t.Errorf("it was said: %q", log)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	os.Remove(filepath.Join(large, "ballast"))
	c, _ = open(t, large)
	if got := all(t, c); len(got) != 1 {
		t.Errorf("afterwards: %+v", got)
	}
}

// TestDamageThatKills cuts off a table in the middle, on which Badger panics
// in a goroutine of its own: nothing can be done for that process, but the
// next one starts afresh.
func TestDamageThatKills(t *testing.T) {
	const env = "ONDOL_TEST_CATALOG"
	if dir := os.Getenv(env); dir != "" {
		c, err := Open(dir, nil)
		if err == nil {
			c.Close()
		}
		return
	}
	dir := t.TempDir()
	c, _ := open(t, dir)
	for i := range 2000 {
		if err := c.Put(record(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	for _, f := range files(t, filepath.Join(dir, "state/*.sst")) {
		fi, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		truncate(t, f, fi.Size()/2)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestDamageThatKills$")
	cmd.Env = append(os.Environ(), env+"="+dir)
	out, err := cmd.CombinedOutput()
	t.Logf("the process that met the damage: %v", err)
	if err != nil && !strings.Contains(string(out), "panic") {
		t.Fatalf("%s", out)
	}
	c, log := open(t, dir)
	if err := c.Put(record("a")); err != nil {
		t.Errorf("%v\n%s", err, log)
	}
}
