package build_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/internal/progress"
	"github.com/ondol-dev/ondol/internal/registry"
	"github.com/ondol-dev/ondol/internal/sandbox"
	"github.com/ondol-dev/ondol/pkg/build"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

func TestMain(m *testing.M) {
	sandbox.Init()
	os.Exit(m.Run())
}

// lab is a place to build in: a registry with a busybox base image, a volume,
// and a context directory.
type lab struct {
	t       *testing.T
	reg     *imagetest.Registry
	volume  string
	context string
	remote  string // repository of the remote cache, "" for none
	args    map[string]string
	target  string
	log     events
	runs    []string // commands that were really run
	mu      sync.Mutex
}

// events keeps what a build reports.
type events struct {
	mu  sync.Mutex
	all []progress.Event
}

func (e *events) Emit(ev progress.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, ev)
}

func newLab(t *testing.T) *lab {
	t.Helper()
	imagetest.NeedRoot(t)
	l := &lab{t: t, reg: imagetest.NewRegistry(t), volume: t.TempDir(), context: t.TempDir(), args: map[string]string{}}
	l.reg.PushBusybox(t, "base")
	return l
}

// file writes a file of the context.
func (l *lab) file(name, content string) {
	l.t.Helper()
	path := filepath.Join(l.context, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) client() *registry.Client {
	c, err := registry.NewClient(registry.Options{Keychain: imagetest.NoCredentials(), Retries: 1})
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

// build builds a Dockerfile, in which BASE stands for the base image, and
// pushes the result as "out".
func (l *lab) build(dockerfile string) (*imagetest.Pulled, error) {
	return l.buildCtx(l.t.Context(), dockerfile)
}

func (l *lab) buildCtx(ctx context.Context, dockerfile string) (*imagetest.Pulled, error) {
	l.t.Helper()
	disk, err := cache.OpenDisk(l.volume)
	if err != nil {
		l.t.Fatal(err)
	}
	defer disk.Close()
	client := l.client()
	opts := build.Options{
		Volume: disk, Registry: client, Scope: "test", Report: progress.New(&l.log),
		Tiers: cache.Tiered{cache.VolumeTier(disk, "test")},
		Run: func(ctx context.Context, s *sandbox.Spec) error {
			l.mu.Lock()
			l.runs = append(l.runs, strings.Join(s.Args, " "))
			l.mu.Unlock()
			return sandbox.Run(ctx, s)
		},
	}
	if l.remote != "" {
		repo := registry.Repository{Host: l.reg.Host, Path: l.remote}
		store := cache.RegistryStore(client, repo)
		opts.Remote = cache.NewRemote(store, cache.RemoteOptions{})
		opts.RemoteRepository = &repo
		opts.Tiers = append(opts.Tiers, &cache.Tier{Name: "remote", Table: opts.Remote, Open: store.Blob, Repository: &repo})
	}
	b, err := build.New(opts)
	if err != nil {
		l.t.Fatal(err)
	}
	l.runs, l.log.all = nil, nil
	dockerfile = strings.ReplaceAll(dockerfile, "BASE", l.reg.Host+"/base")
	img, err := b.Build(ctx, build.Request{
		Context: l.context, Dockerfile: filepath.Join(l.context, "Dockerfile"), Content: []byte(dockerfile), BuildArgs: l.args, Target: l.target,
		Export: func(ctx context.Context, img *build.Image) error {
			return img.Push(ctx, registry.Reference{Repository: registry.Repository{Host: l.reg.Host, Path: "out"}, Tag: "latest"})
		},
	})
	if err != nil {
		return nil, err
	}
	requests := l.reg.Requests()
	p := l.reg.Pull(l.t, "out")
	l.reg.Requests()
	l.reg.Replay(requests)
	if p.Digest != img.Descriptor.Digest.String() {
		l.t.Errorf("pushed %s, pulled %s", img.Descriptor.Digest, p.Digest)
	}
	return p, nil
}

func (l *lab) must(dockerfile string) *imagetest.Pulled {
	l.t.Helper()
	p, err := l.build(dockerfile)
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// files describes what the layers above the base show, one line per path.
func (l *lab) files(p *imagetest.Pulled, base int) string {
	l.t.Helper()
	var dirs []string
	for _, layer := range p.Layers[base:] {
		dir := l.t.TempDir()
		if _, err := snapshot.Apply(l.t.Context(), bytes.NewReader(layer), dir, snapshot.ApplyOptions{}); err != nil {
			l.t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	v := snapshot.NewTreeView(dirs)
	var b strings.Builder
	err := snapshot.Walk(v, "", func(e snapshot.Entry) error {
		if e.Path == "" {
			return nil
		}
		fmt.Fprintf(&b, "%s %s %04o %d:%d", e.Path, e.Type, e.Mode, e.UID, e.GID)
		switch e.Type {
		case snapshot.File:
			content, err := snapshot.ReadFile(l.t.Context(), v, e.Path, 1<<20)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", content)
		case snapshot.Symlink:
			fmt.Fprintf(&b, " -> %s", e.Link)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return b.String()
}

func history(p *imagetest.Pulled) string {
	var b strings.Builder
	for _, h := range p.Config.History {
		mark := "+"
		if h.EmptyLayer {
			mark = "-"
		}
		fmt.Fprintf(&b, "%s %s\n", mark, h.CreatedBy)
	}
	return b.String()
}

func (l *lab) checkClean() {
	l.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		l.t.Fatal(err)
	}
	if strings.Contains(string(mounts), l.volume) {
		l.t.Errorf("a mount is left:\n%s", mounts)
	}
	left, _ := filepath.Glob(filepath.Join(l.volume, "work", "*"))
	if len(left) != 0 {
		l.t.Errorf("files are left: %v", left)
	}
}

const multistage = `
ARG TAG=latest
FROM BASE:${TAG} AS compile
ARG VERSION=1
ENV OUT=/out
WORKDIR /src
COPY src .
COPY <<EOF conf
version $VERSION
EOF
RUN mkdir $OUT && cat *.txt conf > $OUT/result && ln -s result $OUT/link && echo "ran as $(id -u)"

FROM BASE AS unused
RUN exit 1

FROM scratch
LABEL version=1
COPY --from=compile --chown=1:2 /out /app/
COPY --from=BASE /etc/group /etc/
ADD --chmod=700 src/b.txt /app/b
USER 5
WORKDIR /home
EXPOSE 80
ENTRYPOINT ["/app/b"]
CMD x y
`

func TestMultistage(t *testing.T) {
	l := newLab(t)
	l.file("src/a.txt", "a\n")
	l.file("src/b.txt", "b\n")
	l.file("src/ignored", "i")
	l.file(".dockerignore", "**/ignored")
	l.args["VERSION"] = "2"
	p := l.must(multistage)
	want := `app dir 0755 1:2
app/b file 0700 0:0 "b\n"
app/link symlink 0777 1:2 -> result
app/result file 0644 1:2 "a\nb\nversion 2\n"
etc dir 0755 0:0
etc/group file 0644 0:0 "root:x:0:\nusers:x:100:\nstaff:x:20:worker\n"
home dir 0755 5:5
`
	if got := l.files(p, 0); got != want {
		t.Errorf("files:\n%s\nwant:\n%s", got, want)
	}
	wantHistory := `- LABEL version=1
+ COPY --chown=1:2 /out /app/ # buildkit
+ COPY /etc/group /etc/ # buildkit
+ ADD --chmod=700 src/b.txt /app/b # buildkit
- USER 5
+ WORKDIR /home
- EXPOSE [80/tcp]
- ENTRYPOINT ["/app/b"]
- CMD ["/bin/sh" "-c" "x y"]
`
	if got := history(p); got != wantHistory {
		t.Errorf("history:\n%s\nwant:\n%s", got, wantHistory)
	}
	c := p.Config.Config
	if c.User != "5" || c.WorkingDir != "/home" || c.Labels["version"] != "1" || len(c.ExposedPorts) != 1 || c.Entrypoint[0] != "/app/b" {
		t.Errorf("config: %+v", c)
	}
	if len(l.runs) != 1 {
		t.Errorf("commands: %q", l.runs)
	}
	l.checkClean()
}

// TestCachedIsEqual checks that building again does nothing, gives the very
// same image, and that nothing but content counts.
func TestCachedIsEqual(t *testing.T) {
	l := newLab(t)
	l.remote = "cache"
	l.file("src/a.txt", "a\n")
	l.file("src/b.txt", "b\n")
	first := l.must(multistage)
	again := func(what string) {
		t.Helper()
		p := l.must(multistage)
		if p.Digest != first.Digest {
			t.Errorf("%s: another image", what)
		}
		if len(l.runs) != 0 {
			t.Errorf("%s: commands were run: %q", what, l.runs)
		}
	}
	again("again")
	now := time.Now().Add(time.Hour)
	os.Chtimes(filepath.Join(l.context, "src/a.txt"), now, now)
	again("after touch")
	os.Chown(filepath.Join(l.context, "src/a.txt"), 1234, 1234)
	again("after chown")
	l.file("unrelated", "x")
	again("with a file that nobody copies")

	// On another machine, with nothing but the remote cache.
	l.volume = t.TempDir()
	l.reg.Requests()
	again("on a fresh volume")
	requests := l.reg.Requests()
	if n := imagetest.Count(requests, "GET", "/blobs/"); n > 2 { // the configs of the base images
		t.Errorf("blobs were fetched: %q", requests)
	}
	if n := imagetest.Count(requests, "PUT", "/blobs/uploads"); n > 1 { // the config
		t.Errorf("blobs were uploaded: %q", requests)
	}
	trees, _ := os.ReadDir(filepath.Join(l.volume, "trees"))
	if len(trees) != 0 {
		t.Errorf("layers were unpacked: %v", trees)
	}
	l.checkClean()
}

// TestInvalidation checks what makes a step be run again.
func TestInvalidation(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*lab)
		from   string // in the Dockerfile
		to     string
		runs   int
	}{
		{"nothing", nil, "", "", 0},
		{"content", func(l *lab) { l.file("src/a.txt", "A\n") }, "", "", 1},
		{"mode", func(l *lab) { os.Chmod(filepath.Join(l.context, "src/a.txt"), 0o600) }, "", "", 1},
		{"name", func(l *lab) {
			os.Rename(filepath.Join(l.context, "src/a.txt"), filepath.Join(l.context, "src/z.txt"))
		}, "", "", 1},
		{"build argument that is used", func(l *lab) { l.args["VERSION"] = "9" }, "", "", 1},
		{"build argument that is not declared", func(l *lab) { l.args["OTHER"] = "9" }, "", "", 0},
		{"command", nil, "ran as", "was run as", 1},
		{"variable", nil, "ENV OUT=/out", "ENV OUT=/out X=1", 1},
		{"here-document", nil, "version $VERSION", "Version $VERSION", 1},
		{"comment", nil, "WORKDIR /src", "# a comment\nWORKDIR /src", 0},
		{"label", nil, "LABEL version=1", "LABEL version=2", 0},
		{"command of the image", nil, "CMD x y", "CMD z", 0},
		{"user of later steps", nil, "USER 5", "USER 6", 0},
		{"variable behind the command", nil, "LABEL version=1", "LABEL version=1\nENV A=b", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.file("src/a.txt", "a\n")
			l.file("src/b.txt", "b\n")
			l.must(multistage)
			if tt.change != nil {
				tt.change(l)
			}
			l.must(strings.Replace(multistage, tt.from, tt.to, 1))
			if len(l.runs) != tt.runs {
				t.Errorf("commands: %q, want %d", l.runs, tt.runs)
			}
		})
	}
}

// TestBaseMoves checks that a new base image under the same tag is noticed,
// unless the files of the image do not come from it.
func TestBaseMoves(t *testing.T) {
	l := newLab(t)
	const df = "FROM BASE\nRUN cat /etc/motd > /got\n"
	l.reg.Push(t, "base", nil, imagetest.TarOf(t, imagetest.BusyboxTree(t)), imagetest.Tar(imagetest.File("etc/motd", "one")))
	l.must(df)
	l.reg.Push(t, "base", nil, imagetest.TarOf(t, imagetest.BusyboxTree(t)), imagetest.Tar(imagetest.File("etc/motd", "two")))
	p := l.must(df)
	if got := l.files(p, len(p.Layers)-1); !strings.Contains(got, `"two"`) {
		t.Errorf("files: %s", got)
	}
}

// TestSnapshots checks what ends up in layers after commands.
func TestSnapshots(t *testing.T) {
	l := newLab(t)
	p := l.must(`FROM BASE
RUN echo 1 > /a && mkdir -p /d/e && echo x > /d/e/f && ln /a /b && ln -s a /l
RUN rm /a && chmod 4755 /b && rm -r /d/e && echo new > /d/g && chown 7:8 /l -h
RUN true
RUN cat /etc/resolv.conf /etc/hosts > /dev/null && ls /dev > /dev/null && echo boo > /tmp/x && rm /tmp/x
COPY --from=BASE etc/passwd /d/
RUN test ! -e /a && test -u /b && test -e /d/passwd && ! test -e /d/e
`)
	want := `b file 4755 0:0 "1\n"
d dir 0755 0:0
d/g file 0644 0:0 "new\n"
d/passwd file 0644 0:0 "root:x:0:0:root:/root:/bin/sh\nworker:x:1000:100::/home/worker:/bin/sh\n"
l symlink 0777 7:8 -> a
`
	if got := l.files(p, 1); got != want {
		t.Errorf("files:\n%s\nwant:\n%s", got, want)
	}
	if n := len(p.Layers); n != 7 {
		t.Errorf("%d layers, want 7: each step has one, even if it changes nothing", n)
	}
	l.checkClean()
}

// TestErrors checks that whatever is wrong gives one error that says what, and
// where in the Dockerfile, and that nothing is left of the attempt.
func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name, dockerfile string
		line             int
		want             string
	}{
		{"empty", "", 0, "cannot be empty"},
		{"only comments", "# nothing\n", 0, "no instructions"},
		{"no stage", "ARG x\n", 0, "no stages"},
		{"unknown instruction", "FROM scratch\nCOPPY a b\n", 2, "unknown instruction: COPPY (did you mean COPY?)"},
		{"syntax", "FROM scratch\nENV\n", 2, "ENV requires"},
		{"unknown flag", "FROM scratch\nCOPY --form=x a b\n", 2, "unknown flag: --form (did you mean from?)"},
		{"blank base", "FROM ${nothing}\n", 1, "should not be blank"},
		{"bad base name", "FROM UPPER/x\n", 1, "UPPER"},
		{"base that does not exist", "FROM REG/none:1\n", 1, "none:1"},
		{"bad platform", "FROM --platform=a/b/c/d BASE\n", 1, "platform"},
		{"missing source", "FROM scratch\nLABEL a=b\nCOPY none /x\n", 3, `"/none": not found`},
		{"missing source in a stage", "FROM scratch AS a\nFROM scratch\nCOPY --from=a /none /x\n", 3, `"/none": not found`},
		{"source that is ignored", "FROM scratch\nCOPY ignored /\n", 2, `"/ignored": not found`},
		{"stage that comes later", "FROM scratch\nCOPY --from=later /x /\nFROM scratch AS later\nCOPY --from=0 / /\n", 0, "circular"},
		{"later stage", "FROM scratch AS a\nCOPY --from=b a.txt /\nFROM scratch AS b\nCOPY a.txt /\nFROM a\n", 2, "needs to be defined before"},
		{"bad mode", "FROM scratch\nCOPY --chmod=99999 a.txt /\n", 2, "invalid chmod"},
		{"failing command", "FROM BASE\nRUN exit 3\n", 2, `process "/bin/sh -c exit 3" did not complete successfully: exit code: 3`},
		{"no shell", "FROM scratch\nCOPY a.txt /\nRUN echo\n", 3, "exit code: 127"},
		{"unknown user", "FROM BASE\nUSER nobodyknows\nRUN true\n", 3, "nobodyknows"},
		{"copy onto a directory", "FROM scratch\nCOPY a.txt /d/e/x\nCOPY e /d/\n", 3, "cannot replace to directory"},
		{"expose", "FROM scratch\nEXPOSE 99999\n", 2, "99999"},
		{"stop signal", "FROM scratch\nSTOPSIGNAL SIGNOPE\n", 2, "SIGNOPE"},
		{"unset with message", "FROM scratch\nENV a=\"${b:?b is missing}\"\n", 2, "b is missing"},
		{"not supported yet", "FROM BASE\nRUN --mount=type=cache,target=/c true\n", 2, "not supported yet"},
		{"broken archive", "FROM scratch\nADD broken.tar /\n", 2, "broken.tar"},
		{"target", "FROM scratch AS thing\n", 0, "did you mean"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.file("a.txt", "a")
			l.file("ignored", "a")
			l.file("e", "file")
			l.file("broken.tar", string(imagetest.Tar(imagetest.File("f", strings.Repeat("x", 5000)))[:3000]))
			l.file(".dockerignore", "ignored")
			if tt.name == "target" {
				l.target = "thin"
			}
			_, err := l.build(strings.ReplaceAll(tt.dockerfile, "REG", l.reg.Host))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if !strings.Contains(err.Error(), "Dockerfile") {
				t.Errorf("the error does not name the Dockerfile: %v", err)
			}
			var where *build.Error
			if line := 0; errors.As(err, &where) {
				line = where.Line
				if tt.line != 0 && line != tt.line || !strings.Contains(where.Source, fmt.Sprintf("%4d | >>>", line)) {
					t.Errorf("line %d, want %d:\n%s", line, tt.line, where.Source)
				}
			} else if tt.line != 0 {
				t.Errorf("the error has no line: %v", err)
			}
			var exit *sandbox.ExitError
			if tt.name == "failing command" && (!errors.As(err, &exit) || exit.Code != 3) {
				t.Errorf("the exit code is lost: %v", err)
			}
			l.checkClean()
		})
	}
}

// TestFailureKeepsSteps checks that what was done before a failure need not be
// done again.
func TestFailureKeepsSteps(t *testing.T) {
	l := newLab(t)
	l.remote = "cache"
	if _, err := l.build("FROM BASE\nRUN echo one > /one\nRUN exit 1\n"); err == nil {
		t.Fatal("the build did not fail")
	}
	l.volume = t.TempDir()
	l.must("FROM BASE\nRUN echo one > /one\nRUN exit 0\n")
	if len(l.runs) != 1 {
		t.Errorf("commands: %q", l.runs)
	}
}

// TestCancel interrupts a build in all its phases.
func TestCancel(t *testing.T) {
	for _, after := range []string{"/manifests/", "/blobs/sha256", "RUN", "uploads"} {
		t.Run(strings.Trim(after, "/"), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			stop := errors.New("stop")
			if after == "RUN" {
				time.AfterFunc(400*time.Millisecond, func() { cancel(stop) })
			} else {
				l.reg.Add(imagetest.Hang(ctx, cancel, stop, after))
			}
			df := "FROM BASE\nRUN echo x > /x\n"
			if after == "RUN" {
				df += "RUN sleep 54321\n"
			}
			start := time.Now()
			_, err := l.buildCtx(ctx, df)
			if !errors.Is(err, stop) {
				t.Errorf("error %v, want %v", err, stop)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("took %v to stop", d)
			}
			l.checkClean()
		})
	}
}

// TestSameStepTwice checks that two stages with the same step do not get in
// each other's way.
func TestSameStepTwice(t *testing.T) {
	l := newLab(t)
	l.file("f", "x")
	p := l.must(`FROM BASE AS a
COPY f /f
RUN echo same > /same
FROM BASE AS b
COPY f /f
RUN echo same > /same
FROM scratch
COPY --from=a /same /a
COPY --from=b /same /b
`)
	if got := l.files(p, 0); got != "a file 0644 0:0 \"same\\n\"\nb file 0644 0:0 \"same\\n\"\n" {
		t.Errorf("files:\n%s", got)
	}
	l.checkClean()
}

// TestConcurrentBuilds builds different images on one volume at the same time.
func TestConcurrentBuilds(t *testing.T) {
	l := newLab(t)
	var wg sync.WaitGroup
	for i := range 4 {
		other := &lab{t: t, reg: l.reg, volume: l.volume, context: t.TempDir(), args: map[string]string{}}
		wg.Go(func() {
			disk, err := cache.OpenDisk(other.volume)
			if err != nil {
				t.Error(err)
				return
			}
			defer disk.Close()
			b, err := build.New(build.Options{Volume: disk, Registry: other.client(), Scope: "test"})
			if err != nil {
				t.Error(err)
				return
			}
			df := fmt.Sprintf("FROM %s/base\nRUN echo shared > /s\nRUN echo %d > /own\n", l.reg.Host, i)
			if _, err := b.Build(t.Context(), build.Request{Context: other.context, Dockerfile: "Dockerfile", Content: []byte(df)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l.checkClean()
}

// TestDamagedVolume damages every file of a volume: whatever it is, the next
// build makes the same image from what is left.
func TestDamagedVolume(t *testing.T) {
	l := newLab(t)
	l.remote = "cache"
	const df = "FROM BASE\nRUN echo one > /one\nRUN cat /one > /two\n"
	first := l.must(df)
	for _, dir := range []string{"blobs", "toc", "refs", "keys"} {
		filepath.Walk(filepath.Join(l.volume, dir), func(p string, fi os.FileInfo, err error) error {
			if err == nil && fi.Mode().IsRegular() {
				os.Chmod(p, 0o644)
				os.WriteFile(p, bytes.Repeat([]byte("x"), int(fi.Size())), 0o644)
			}
			return nil
		})
		if p := l.must(df); p.Digest != first.Digest {
			t.Errorf("after damage to %s: another image", dir)
		}
		// And a step on top, which needs the layers.
		if p := l.must(df + "RUN cat /two > /" + dir + "\n"); !strings.Contains(l.files(p, len(p.Layers)-1), dir+` file 0644 0:0 "one\n"`) {
			t.Errorf("after damage to %s: wrong files", dir)
		}
		os.RemoveAll(filepath.Join(l.volume, "trees"))
		os.Mkdir(filepath.Join(l.volume, "trees"), 0o755)
	}
}
