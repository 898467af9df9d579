package snapshot_test

import (
	"errors"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// stacks are layers, lowest first, and what they show together. Each is
// checked for the view of the tables, the view of the trees, and what the
// kernel's overlayfs makes of the trees.
var stacks = []struct {
	name   string
	layers [][]imagetest.Entry
	want   string
}{
	{
		name: "one layer",
		layers: [][]imagetest.Entry{{
			dir("etc"), file("etc/passwd", "root", imagetest.Mode(0o600)), symlink("bin", "usr/bin"),
			dir("usr"), dir("usr/bin"), file("usr/bin/su", "x", imagetest.Mode(0o4755), imagetest.Owner(1, 2)),
		}},
		want: `
			bin symlink 0777 0:0 -> usr/bin
			etc dir 0755 0:0
			etc/passwd file 0600 0:0 1700000000 "root"
			usr dir 0755 0:0
			usr/bin dir 0755 0:0
			usr/bin/su file 4755 1:2 1700000000 "x"`,
	},
	{
		name: "replaced and removed and added",
		layers: [][]imagetest.Entry{
			{dir("d"), file("d/a", "1"), file("d/b", "2"), file("d/c", "3")},
			{dir("d", imagetest.Mode(0o700)), file("d/.wh.a", ""), file("d/b", "two"), file("d/e", "5")},
		},
		want: `
			d dir 0700 0:0
			d/b file 0644 0:0 1700000000 "two"
			d/c file 0644 0:0 1700000000 "3"
			d/e file 0644 0:0 1700000000 "5"`,
	},
	{
		name: "opaque before and after what it keeps",
		layers: [][]imagetest.Entry{
			{dir("d"), file("d/a", "1"), dir("d/s"), file("d/s/t", "2"), dir("e"), file("e/x", "1")},
			{dir("d"), file("d/new", "n"), file("d/.wh..wh..opq", ""), file("e/.wh..wh..opq", ""), file("e/y", "2")},
		},
		want: `
			d dir 0755 0:0
			d/new file 0644 0:0 1700000000 "n"
			e dir 0755 0:0
			e/y file 0644 0:0 1700000000 "2"`,
	},
	{
		name: "removed directory comes back",
		layers: [][]imagetest.Entry{
			{dir("d"), file("d/a", "1")},
			{file(".wh.d", "")},
			{dir("d"), file("d/b", "2")},
		},
		want: `
			d dir 0755 0:0
			d/b file 0644 0:0 1700000000 "2"`,
	},
	{
		name: "whiteout and the path itself in one layer",
		layers: [][]imagetest.Entry{
			{dir("d"), file("d/old", "1"), file("f", "1"), dir("g"), file("g/old", "1")},
			{file(".wh.d", ""), dir("d"), file("d/new", "2"), file("f", "2"), file(".wh.f", ""), dir("g"), file("g/new", "2"), file(".wh.g", "")},
		},
		want: `
			d dir 0755 0:0
			d/new file 0644 0:0 1700000000 "2"
			f file 0644 0:0 1700000000 "2"
			g dir 0755 0:0
			g/new file 0644 0:0 1700000000 "2"`,
	},
	{
		name: "types change",
		layers: [][]imagetest.Entry{
			{dir("d"), file("d/a", "1"), file("f", "2"), symlink("l", "d")},
			{file("d", "now a file"), dir("f"), file("f/x", "3"), dir("l"), file("l/y", "4")},
		},
		want: `
			d file 0644 0:0 1700000000 "now a file"
			f dir 0755 0:0
			f/x file 0644 0:0 1700000000 "3"
			l dir 0755 0:0
			l/y file 0644 0:0 1700000000 "4"`,
	},
	{
		name: "parents that the layer does not carry",
		layers: [][]imagetest.Entry{
			{dir("a", imagetest.Mode(0o700), imagetest.Owner(5, 6)), dir("a/b", imagetest.Mode(0o750))},
			{file("a/b/c", "1"), file("x/y/z", "2")},
		},
		want: `
			a dir 0700 5:6
			a/b dir 0750 0:0
			a/b/c file 0644 0:0 1700000000 "1"
			x dir 0755 0:0
			x/y dir 0755 0:0
			x/y/z file 0644 0:0 1700000000 "2"`,
	},
	{
		name: "parent is a symlink of a lower layer",
		layers: [][]imagetest.Entry{
			{dir("run"), dir("var"), symlink("var/run", "/run"), symlink("up", "var/../run/./")},
			{file("var/run/pid", "1"), file("up/two", "2"), link("var/run/three", "up/two"), file("var/run/.wh.none", "")},
		},
		want: `
			run dir 0755 0:0
			run/pid file 0644 0:0 1700000000 "1"
			run/three file 0644 0:0 1700000000 "2"
			run/two file 0644 0:0 1700000000 "2" = run/three
			up symlink 0777 0:0 -> var/../run/./
			var dir 0755 0:0
			var/run symlink 0777 0:0 -> /run`,
	},
	{
		name: "hard links",
		layers: [][]imagetest.Entry{
			{file("a", "x"), link("b", "a"), link("c", "./b")},
			{file("a", "y")},
		},
		want: `
			a file 0644 0:0 1700000000 "y"
			b file 0644 0:0 1700000000 "x"
			c file 0644 0:0 1700000000 "x" = b`,
	},
	{
		name: "special files and capabilities",
		layers: [][]imagetest.Entry{{
			imagetest.Fifo("p"), imagetest.Device("null", 1, 3),
			file("ping", "x", imagetest.Mode(0o755), imagetest.Xattr("security.capability", netRaw)),
		}},
		want: `
			null char 0666 0:0 1,3
			p fifo 0644 0:0
			ping file 0755 0:0 1700000000 "x" cap=0100000200200000000000000000000000000000`,
	},
}

// netRaw is cap_net_raw=ep in the kernel's encoding, version 2.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func TestViews(t *testing.T) {
	imagetest.NeedRoot(t)
	for _, tt := range stacks {
		want := strings.TrimPrefix(strings.ReplaceAll(tt.want, "\t", ""), "\n") + "\n"
		var layers [][]byte
		for _, l := range tt.layers {
			layers = append(layers, imagetest.Tar(l...))
		}
		t.Run(tt.name+"/trees", func(t *testing.T) {
			dirs, _ := stack(t, layers...)
			diff(t, "view of the trees", describe(t, snapshot.NewTreeView(dirs)), want)
		})
		t.Run(tt.name+"/tables", func(t *testing.T) {
			dirs, tocs := stack(t, layers...)
			v, err := snapshot.NewStackView(tables(dirs, tocs))
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "view of the tables", describe(t, v), want)
		})
		t.Run(tt.name+"/mixed", func(t *testing.T) {
			dirs, tocs := stack(t, layers...)
			mixed := tables(dirs, tocs)
			for i := 0; i < len(mixed); i += 2 {
				mixed[i] = snapshot.StackLayer{Tree: dirs[i]}
			}
			v, err := snapshot.NewStackView(mixed)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "view of trees and tables", describe(t, v), want)
		})
		t.Run(tt.name+"/kernel", func(t *testing.T) {
			imagetest.PrivateMounts(t)
			dirs, _ := stack(t, layers...)
			diff(t, "overlay mount", describe(t, snapshot.NewDirView(mountOverlay(t, dirs, "", ""), nil)), want)
		})
	}
}

// mountOverlay mounts trees, lowest first, in the test's own mount namespace.
func mountOverlay(t *testing.T, dirs []string, upper, work string) string {
	t.Helper()
	var lower []string
	for _, d := range dirs {
		lower = append([]string{d}, lower...)
	}
	if len(lower) == 1 && upper == "" {
		lower = append(lower, t.TempDir())
	}
	o := "lowerdir=" + strings.Join(lower, ":") + ",userxattr"
	if upper != "" {
		o += ",upperdir=" + upper + ",workdir=" + work + ",volatile"
	}
	merged := t.TempDir()
	if err := unix.Mount("overlay", merged, "overlay", 0, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(merged, unix.MNT_DETACH) })
	return merged
}

func TestResolve(t *testing.T) {
	imagetest.NeedRoot(t)
	dirs, _ := stack(t, imagetest.Tar(
		dir("usr"), dir("usr/bin"), symlink("bin", "usr/bin"), symlink("abs", "/usr/bin"),
		symlink("out", "../../../usr"), symlink("loop", "loop"), symlink("dangling", "/no/where"),
		symlink("chain", "bin"), file("f", ""),
	))
	v := snapshot.NewTreeView(dirs)
	for _, tt := range []struct {
		path   string
		follow bool
		want   string
	}{
		{"bin/sh", true, "usr/bin/sh"},
		{"/abs//./sh", true, "usr/bin/sh"},
		{"out/bin", true, "usr/bin"},
		{"chain", true, "usr/bin"},
		{"chain", false, "chain"},
		{"chain/", false, "chain"},
		{"chain/.", false, "chain"},
		{"dangling", true, "no/where"},
		{"dangling/x", false, "no/where/x"},
		{"new/dir/../x", true, "new/x"},
		{"../..", true, ""},
		{"bin/..", true, "usr"},
		{"f/x", true, "f/x"},
	} {
		got, err := snapshot.Resolve(v, tt.path, tt.follow)
		if err != nil || got != tt.want {
			t.Errorf("Resolve(%q, %v) = %q, %v, want %q", tt.path, tt.follow, got, err, tt.want)
		}
	}
	if _, err := snapshot.Resolve(v, "loop/x", true); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("Resolve through a loop: %v, want ELOOP", err)
	}
}

func TestLstatErrors(t *testing.T) {
	imagetest.NeedRoot(t)
	layer := imagetest.Tar(file("f", "x"), dir("d"), symlink("l", "d"))
	dirs, tocs := stack(t, layer)
	tables, err := snapshot.NewStackView(tables(nil, tocs))
	if err != nil {
		t.Fatal(err)
	}
	draft := snapshot.NewDraft(tables)
	if err := draft.Put(snapshot.Entry{Path: "g", Type: snapshot.File}, snapshot.Empty, ""); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]snapshot.View{
		"trees": snapshot.NewTreeView(dirs), "tables": tables, "dir": snapshot.NewDirView(dirs[0], nil), "draft": draft,
	} {
		for path, want := range map[string]error{"none": fs.ErrNotExist, "d/none": fs.ErrNotExist, "none/x": fs.ErrNotExist, "f/x": syscall.ENOTDIR, "l/x": syscall.ENOTDIR} {
			if _, err := v.Lstat(path); !errors.Is(err, want) {
				t.Errorf("%s: Lstat(%q): %v, want %v", name, path, err, want)
			}
		}
		if _, err := v.ReadDir("f"); !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("%s: ReadDir of a file: %v, want ENOTDIR", name, err)
		}
	}
	if _, err := draft.Lstat("g/x"); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("below a file of the draft: %v, want ENOTDIR", err)
	}
}
