package snapshot_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// overlay is a real overlay mount on top of layers, in the test's own mount
// namespace.
type overlay struct {
	t             *testing.T
	lower         []string
	merged, upper string
}

func newOverlay(t *testing.T, layers ...[]byte) *overlay {
	imagetest.PrivateMounts(t)
	dirs, _ := stack(t, layers...)
	o := &overlay{t: t, lower: dirs, upper: t.TempDir()}
	o.merged = mountOverlay(t, dirs, o.upper, t.TempDir())
	return o
}

func (o *overlay) path(p string) string { return filepath.Join(o.merged, p) }

func (o *overlay) do(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

// set gives every file that the test makes the same time, so that only what
// matters shows up as a difference.
func (o *overlay) set(p string) {
	o.t.Helper()
	ts := []unix.Timespec{{Sec: imagetest.Epoch.Unix(), Nsec: 123}, {Sec: imagetest.Epoch.Unix(), Nsec: 123}}
	o.do(unix.UtimesNanoAt(unix.AT_FDCWD, o.path(p), ts, unix.AT_SYMLINK_NOFOLLOW))
}

func (o *overlay) write(p, content string) {
	o.t.Helper()
	o.do(os.WriteFile(o.path(p), []byte(content), 0o644))
	o.set(p)
}

// changes returns the layer, and checks that it turns the lower layers into
// what the mount shows.
func (o *overlay) changes() string {
	o.t.Helper()
	changes, err := snapshot.ScanUpper(o.t.Context(), o.upper, snapshot.NewTreeView(o.lower))
	o.do(err)
	layer, toc := writeLayer(o.t, changes)
	tree, applied := apply(o.t, layer, snapshot.NewTreeView(o.lower))
	if applied.Dependent {
		o.t.Error("the layer does not carry all its parents")
	}
	want := withoutLinks(describe(o.t, snapshot.NewDirView(o.merged, nil)))
	diff(o.t, "layer applied again", withoutLinks(describe(o.t, snapshot.NewTreeView(append(o.lower, tree)))), want)
	var b strings.Builder
	for _, c := range changes {
		fmt.Fprintf(&b, "%s %s\n", c.Path, c.Type)
	}
	diff(o.t, "table written and table read", tocString(applied.TOC), tocString(toc))
	return b.String()
}

// withoutLinks drops which names are hard links of each other: a layer cannot
// link to a file of a lower one.
func withoutLinks(description string) string {
	return regexp.MustCompile(` = .*`).ReplaceAllString(description, "")
}

func tocString(t *snapshot.TOC) string {
	var b strings.Builder
	for e := range t.All() {
		fmt.Fprintln(&b, e.Path, e.Type, e.Opaque, e.Implicit, e.Mode, e.UID, e.GID, e.Size, e.ModTime, e.Link, e.Major, e.Minor, e.Xattrs)
	}
	return b.String()
}

var base = imagetest.Tar(
	dir("bin"), file("bin/sh", "shell", imagetest.Mode(0o755)), file("bin/su", "su", imagetest.Mode(0o4755)),
	dir("etc"), file("etc/passwd", "root:x:0:0\n"), file("etc/group", "root:x:0:\n"), symlink("etc/mtab", "/proc/mounts"),
	dir("usr"), dir("usr/share"), file("usr/share/a", "a"), file("usr/share/b", "b"), dir("usr/share/sub"), file("usr/share/sub/c", "c"),
	file("one", "linked"), link("two", "one"),
)

func TestScanUpper(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(*overlay)
		want string
	}{
		{"nothing", func(*overlay) {}, ""},
		{"added", func(o *overlay) { o.write("etc/new", "x") }, `
			etc dir
			etc/new file`},
		{"changed", func(o *overlay) { o.write("etc/passwd", "x") }, `
			etc dir
			etc/passwd file`},
		{"other content of the same size and second", func(o *overlay) { o.write("usr/share/a", "A") }, `
			usr dir
			usr/share dir
			usr/share/a file`},
		{"written with what it had", func(o *overlay) { o.write("usr/share/a", "a") }, ""},
		{"moved away and back", func(o *overlay) {
			o.do(os.Rename(o.path("usr/share/a"), o.path("usr/share/x")))
			o.do(os.Rename(o.path("usr/share/x"), o.path("usr/share/a")))
		}, ""},
		{"removed", func(o *overlay) { o.do(os.Remove(o.path("bin/sh"))) }, `
			bin dir
			bin/sh whiteout`},
		{"added and removed", func(o *overlay) { o.write("bin/x", ""); o.do(os.Remove(o.path("bin/x"))) }, ""},
		{"directory removed", func(o *overlay) { o.do(os.RemoveAll(o.path("usr/share"))) }, `
			usr dir
			usr/share whiteout`},
		{"directory made anew", func(o *overlay) {
			o.do(os.RemoveAll(o.path("usr/share")))
			o.do(os.Mkdir(o.path("usr/share"), 0o755))
			o.write("usr/share/b", "b")
			o.write("usr/share/new", "n")
		}, `
			usr dir
			usr/share dir
			usr/share/a whiteout
			usr/share/sub whiteout
			usr/share/new file`},
		{"file becomes directory", func(o *overlay) {
			o.do(os.Remove(o.path("bin/sh")))
			o.do(os.Mkdir(o.path("bin/sh"), 0o755))
			o.write("bin/sh/x", "")
		}, `
			bin dir
			bin/sh dir
			bin/sh/x file`},
		{"directory becomes link", func(o *overlay) {
			o.do(os.RemoveAll(o.path("usr/share")))
			o.do(os.Symlink("../etc", o.path("usr/share")))
		}, `
			usr dir
			usr/share symlink`},
		{"renamed", func(o *overlay) { o.do(os.Rename(o.path("etc/group"), o.path("etc/gruppe"))) }, `
			etc dir
			etc/group whiteout
			etc/gruppe file`},
		{"mode", func(o *overlay) { o.do(os.Chmod(o.path("bin/sh"), 0o700)) }, `
			bin dir
			bin/sh file`},
		{"setuid removed", func(o *overlay) { o.do(os.Chmod(o.path("bin/su"), 0o755)) }, `
			bin dir
			bin/su file`},
		{"owner", func(o *overlay) { o.do(os.Lchown(o.path("etc/mtab"), 1, 2)); o.set("etc/mtab") }, `
			etc dir
			etc/mtab symlink`},
		{"directory's mode", func(o *overlay) { o.do(os.Chmod(o.path("usr/share"), 0o1777)) }, `
			usr dir
			usr/share dir`},
		{"directory's time alone", func(o *overlay) { o.set("usr/share") }, ""},
		{"mode changed and back", func(o *overlay) {
			o.do(os.Chmod(o.path("bin/sh"), 0o700))
			o.do(os.Chmod(o.path("bin/sh"), 0o755))
		}, ""},
		{"time", func(o *overlay) { o.do(os.Chtimes(o.path("bin/sh"), time.Unix(1, 0), time.Unix(1, 0))) }, `
			bin dir
			bin/sh file`},
		{"capability", func(o *overlay) {
			o.do(unix.Setxattr(o.path("bin/sh"), snapshot.Capability, []byte(netRaw), 0))
		}, `
			bin dir
			bin/sh file`},
		{"other attributes", func(o *overlay) { o.do(unix.Setxattr(o.path("bin/sh"), "trusted.note", []byte("x"), 0)) }, ""},
		{"hard links among new files", func(o *overlay) {
			o.write("etc/a", "x")
			o.do(os.Link(o.path("etc/a"), o.path("bin/b")))
		}, `
			bin dir
			bin/b file
			etc dir
			etc/a hardlink`},
		{"hard link to a lower file is a copy", func(o *overlay) { o.do(os.Link(o.path("bin/sh"), o.path("bin/zsh"))) }, `
			bin dir
			bin/zsh file`},
		{"special files", func(o *overlay) {
			o.do(unix.Mknod(o.path("etc/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
			o.do(unix.Mkfifo(o.path("etc/fifo"), 0o600))
			o.do(unix.Mknod(o.path("etc/sock"), unix.S_IFSOCK|0o600, 0))
		}, `
			etc dir
			etc/fifo fifo
			etc/null char`},
		{"odd names", func(o *overlay) {
			o.do(os.Mkdir(o.path("-d"), 0o755))
			o.write("-d/!", "")
			o.write("-d/\xff\n", "")
			o.write("-d/"+strings.Repeat("n", 255), "")
			o.write("-d/한 글", "")
			o.do(os.Remove(o.path("etc/passwd")))
		}, `
			-d dir
			-d/! file
			-d/` + strings.Repeat("n", 255) + ` file
			-d/한 글 file
			-d/` + "\xff\n" + ` file
			etc dir
			etc/passwd whiteout`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := newOverlay(t, base)
			tt.do(o)
			want := strings.ReplaceAll(tt.want, "\t", "")
			if want != "" {
				want = strings.TrimPrefix(want, "\n") + "\n"
			}
			if got := o.changes(); got != want {
				t.Errorf("layer:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// TestScanUpperRandom makes random changes through a real overlay mount, many
// at a time and layer on layer, and checks that the layers say the same.
func TestScanUpperRandom(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, uint64(seed)))
			layers := [][]byte{base}
			imagetest.PrivateMounts(t)
			for range 3 {
				dirs, _ := stack(t, layers...)
				o := &overlay{t: t, lower: dirs, upper: t.TempDir()}
				o.merged = mountOverlay(t, dirs, o.upper, t.TempDir())
				for range 1 + r.IntN(30) {
					o.randomChange(r)
				}
				o.changes()
				changes, err := snapshot.ScanUpper(t.Context(), o.upper, snapshot.NewTreeView(dirs))
				if err != nil {
					t.Fatal(err)
				}
				layer, _ := writeLayer(t, changes)
				layers = append(layers, layer)
			}
		})
	}
}

// randomChange does something to a random path; what the file system refuses
// does not matter.
func (o *overlay) randomChange(r *rand.Rand) {
	names := []string{"etc", "usr", "share", "a", "b", "sub", "one", "two", "new", "x"}
	pick := func() string {
		var p []string
		for range 1 + r.IntN(3) {
			p = append(p, names[r.IntN(len(names))])
		}
		return o.path(strings.Join(p, "/"))
	}
	p := pick()
	switch r.IntN(12) {
	case 0, 1, 2:
		// Not to wait for a reader, where there is a FIFO.
		if f, err := os.OpenFile(p, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|unix.O_NONBLOCK, 0o600); err == nil {
			f.WriteString(strings.Repeat("y", r.IntN(4)))
			f.Close()
		}
	case 3:
		os.Mkdir(p, 0o711)
	case 4:
		os.MkdirAll(p, 0o755)
	case 5:
		exec.Command("rm", "-rf", p).Run() // os.RemoveAll would open a FIFO that is p's parent
	case 6:
		os.Rename(p, pick())
	case 7:
		os.Link(p, pick())
	case 8:
		os.Symlink("a", p)
	case 9:
		os.Lchown(p, r.IntN(3), r.IntN(3))
	case 10:
		if fi, err := os.Lstat(p); err == nil && fi.Mode()&os.ModeSymlink == 0 {
			os.Chmod(p, os.FileMode(r.IntN(0o1000)))
		}
	case 11:
		unix.Mkfifo(p, 0o600)
	}
}
