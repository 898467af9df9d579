package snapshot_test

import (
	"testing"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

func mem(content string) snapshot.View {
	return snapshot.NewMemView(map[string]snapshot.MemFile{"f": {Content: content, Mode: 0o644}})
}

func TestDraft(t *testing.T) {
	imagetest.NeedRoot(t)
	epoch := imagetest.Epoch.UnixNano()
	put := func(d *snapshot.Draft, path, content string) error {
		return d.Put(snapshot.Entry{Path: path, Type: snapshot.File, Mode: 0o644, Size: int64(len(content)), ModTime: epoch}, mem(content), "f")
	}
	mkdir := func(d *snapshot.Draft, path string, mode uint32) error {
		return d.Put(snapshot.Entry{Path: path, Type: snapshot.Dir, Mode: mode, ModTime: epoch}, nil, "")
	}
	for _, tt := range []struct {
		name  string
		do    func(*snapshot.Draft) error
		layer string
	}{
		{"nothing", func(*snapshot.Draft) error { return nil }, ""},
		{"new file", func(d *snapshot.Draft) error { return put(d, "etc/new", "x") }, "etc dir\netc/new file\n"},
		{"equal file", func(d *snapshot.Draft) error { return put(d, "usr/share/a", "a") }, ""},
		{"equal but for content", func(d *snapshot.Draft) error { return put(d, "usr/share/a", "A") }, "usr dir\nusr/share dir\nusr/share/a file\n"},
		{"equal directory", func(d *snapshot.Draft) error { return mkdir(d, "usr/share", 0o755) }, ""},
		{"directory's mode", func(d *snapshot.Draft) error { return mkdir(d, "usr/share", 0o700) }, "usr dir\nusr/share dir\n"},
		{"remove", func(d *snapshot.Draft) error { d.Remove("usr/share"); return nil }, "usr dir\nusr/share whiteout\n"},
		{"remove what is not there", func(d *snapshot.Draft) error { d.Remove("usr/none"); return nil }, ""},
		{"put and remove", func(d *snapshot.Draft) error {
			err := put(d, "etc/new", "x")
			d.Remove("etc/new")
			return err
		}, ""},
		{"directory made anew", func(d *snapshot.Draft) error {
			d.Remove("usr/share")
			if err := mkdir(d, "usr/share", 0o755); err != nil {
				return err
			}
			return put(d, "usr/share/b", "b")
		}, "usr dir\nusr/share dir\nusr/share/a whiteout\nusr/share/sub whiteout\n"},
		{"directory in place of a file", func(d *snapshot.Draft) error {
			if err := mkdir(d, "bin/sh", 0o755); err != nil {
				return err
			}
			return put(d, "bin/sh/x", "")
		}, "bin dir\nbin/sh dir\nbin/sh/x file\n"},
		{"file in place of a directory", func(d *snapshot.Draft) error { return put(d, "usr/share", "") }, "usr dir\nusr/share file\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dirs, _ := stack(t, base)
			d := snapshot.NewDraft(snapshot.NewTreeView(dirs))
			if err := tt.do(d); err != nil {
				t.Fatal(err)
			}
			changes, err := d.Changes(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, c := range changes {
				got += c.Path + " " + c.Type.String() + "\n"
			}
			if got != tt.layer {
				t.Errorf("layer:\n%swant:\n%s", got, tt.layer)
			}
			layer, _ := writeLayer(t, changes)
			tree, _ := apply(t, layer, nil)
			diff(t, "draft and layer", describe(t, snapshot.NewTreeView(append(dirs, tree))), describe(t, d))
		})
	}
	d := snapshot.NewDraft(snapshot.Empty)
	if err := put(d, "no/dir", "x"); err == nil {
		t.Error("a file was put below a directory that does not exist")
	}
}
