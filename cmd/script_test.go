// Package cmd_test runs the programs themselves, by the scripts in
// testdata/script: each is one readable file with Dockerfiles, contexts, command
// lines and what is expected of them.
package cmd_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// bin is where the programs under test are.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	var err error
	if bin, err = os.MkdirTemp("", "ondol-bin-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(bin)
	build := exec.Command("go", "build", "-o", bin, "./builder", "./warmer")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the programs:", err)
		return 1
	}
	return m.Run()
}

func TestScripts(t *testing.T) {
	imagetest.NeedRoot(t)
	busybox := imagetest.Busybox(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "../testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+":"+env.Getenv("PATH"))
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("BUSYBOX", busybox)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if prog, ok := strings.CutPrefix(cond, "have:"); ok {
				_, err := exec.LookPath(prog)
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"registry": cmdRegistry, "base": cmdBase, "requests": cmdRequests, "image": cmdImage, "tree": cmdTree,
			"tmpfs": cmdTmpfs, "clean": cmdClean, "interrupt": cmdInterrupt, "rootfs": cmdRootfs, "exits": cmdExits, "debian": cmdDebian,
		},
	})
}

// registries holds the registry of each running script, a
// *imagetest.Registry by *testscript.TestScript.
var registries sync.Map

func registryOf(ts *testscript.TestScript) *imagetest.Registry {
	reg, ok := registries.Load(ts)
	if !ok {
		ts.Fatalf("the script has started no registry")
	}
	return reg.(*imagetest.Registry)
}

// cmdRegistry starts the script's registry and sets $REGISTRY to its name.
// With "basic USER PASSWORD" or "token USER PASSWORD" it demands a password
// from then on; with "fail CODE PART" it refuses requests.
func cmdRegistry(ts *testscript.TestScript, _ bool, args []string) {
	if _, ok := registries.Load(ts); !ok {
		t := &scriptT{ts: ts}
		reg := imagetest.NewRegistry(t)
		registries.Store(ts, reg)
		ts.Setenv("REGISTRY", reg.Host)
		ts.Defer(t.cleanup)
	}
	reg := registryOf(ts)
	switch {
	case len(args) == 0:
	case args[0] == "basic":
		reg.RequireBasic(args[1], args[2])
	case args[0] == "token":
		reg.RequireToken(args[1], args[2], nil)
	case args[0] == "fail":
		code, err := strconv.Atoi(args[1])
		ts.Check(err)
		reg.Add(imagetest.Fail(1<<30, code, args[2:]...))
	case args[0] == "heal":
		reg.Heal()
	default:
		ts.Fatalf("usage: registry [basic|token USER PASSWORD | fail CODE PART... | heal]")
	}
}

// cmdBase pushes an image with busybox under a name.
func cmdBase(ts *testscript.TestScript, _ bool, args []string) {
	reg := registryOf(ts)
	t := &scriptT{ts: ts}
	defer t.cleanup()
	for _, name := range args {
		reg.PushBusybox(t, name)
	}
	reg.Requests()
}

// cmdRootfs makes the tar of a root file system with busybox.
func cmdRootfs(ts *testscript.TestScript, _ bool, args []string) {
	t := &scriptT{ts: ts}
	defer t.cleanup()
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), imagetest.TarOf(t, imagetest.BusyboxTree(t)), 0o644))
}

// cmdDebian copies the tar of a Debian root file system.
func cmdDebian(ts *testscript.TestScript, _ bool, args []string) {
	tar, err := imagetest.DebianTar()
	ts.Check(err)
	ts.Check(os.Symlink(tar, ts.MkAbs(args[0])))
}

// cmdRequests prints what the registry was asked since the last time, with
// digests shortened, sorted by what comes first.
func cmdRequests(ts *testscript.TestScript, _ bool, _ []string) {
	var b strings.Builder
	for _, r := range registryOf(ts).Requests() {
		fmt.Fprintln(&b, r)
	}
	fmt.Fprint(ts.Stdout(), b.String())
	ts.Check(os.WriteFile(ts.MkAbs("requests"), []byte(b.String()), 0o644))
}

// cmdImage prints an image of the registry: its config, history, and files,
// without the first N layers if asked so.
func cmdImage(ts *testscript.TestScript, _ bool, args []string) {
	t := &scriptT{ts: ts}
	defer t.cleanup()
	reg := registryOf(ts)
	before := reg.Requests()
	p := reg.Pull(t, args[0])
	reg.Requests()
	reg.Replay(before)
	skip := 0
	if len(args) > 1 {
		skip, _ = strconv.Atoi(args[1])
	}
	out := describe(t, p, skip)
	fmt.Fprint(ts.Stdout(), out)
	ts.Check(os.WriteFile(ts.MkAbs("image"), []byte(out), 0o644))
}

func describe(t *scriptT, p *imagetest.Pulled, skip int) string {
	var b strings.Builder
	c := p.Config.Config
	fmt.Fprintf(&b, "digest %s\nlayers %d\n", p.Digest, len(p.Layers))
	fmt.Fprintf(&b, "user %q workdir %q entrypoint %q cmd %q\n", c.User, c.WorkingDir, c.Entrypoint, c.Cmd)
	for k, v := range c.Labels {
		fmt.Fprintf(&b, "label %s=%s\n", k, v)
	}
	for _, h := range p.Config.History {
		fmt.Fprintf(&b, "history %s\n", h.CreatedBy)
	}
	var dirs []string
	for _, l := range p.Layers[skip:] {
		dir := t.TempDir()
		if _, err := snapshot.Apply(context.Background(), bytes.NewReader(l), dir, snapshot.ApplyOptions{}); err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	b.WriteString(list(t, snapshot.NewTreeView(dirs)))
	return b.String()
}

// list describes the files of a view, with the content of small ones.
func list(t *scriptT, v snapshot.View) string {
	var b strings.Builder
	err := snapshot.Walk(v, "", func(e snapshot.Entry) error {
		if e.Path == "" {
			return nil
		}
		fmt.Fprintf(&b, "%s /%s %04o %d:%d", e.Type, e.Path, e.Mode, e.UID, e.GID)
		if e.Type == snapshot.File && e.Size < 200 {
			content, err := snapshot.ReadFile(context.Background(), v, e.Path, 200)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", content)
		}
		if e.Type == snapshot.Symlink {
			fmt.Fprintf(&b, " -> %s", e.Link)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// cmdTree prints the names in a directory that match a pattern.
func cmdTree(ts *testscript.TestScript, neg bool, args []string) {
	names, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	if (len(names) == 0) != neg {
		ts.Fatalf("%d files match %s", len(names), args[0])
	}
	fmt.Fprintln(ts.Stdout(), strings.Join(names, "\n"))
}

// cmdTmpfs mounts a file system of a size in a directory, until the script
// ends.
func cmdTmpfs(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+args[1]))
	ts.Defer(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// cmdClean checks that nothing is left of builds in the script's directory: no
// mounts, processes or unfinished files.
func cmdClean(ts *testscript.TestScript, _ bool, args []string) {
	work := ts.MkAbs(".")
	var problems []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	ts.Check(err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, work) && !strings.Contains(line, " tmpfs tmpfs ") {
			problems = append(problems, "mount: "+line)
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		if env, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "environ")); bytes.Contains(env, []byte("WORK="+work)) || bytes.HasPrefix(b, []byte("ondol-init")) && bytes.Contains(env, []byte(work)) {
			problems = append(problems, "process: "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	for _, volume := range args {
		left, _ := filepath.Glob(filepath.Join(ts.MkAbs(volume), "work", "*"))
		for _, l := range left {
			problems = append(problems, "file: "+l)
		}
	}
	if len(problems) > 0 {
		ts.Fatalf("left behind:\n%s", strings.Join(problems, "\n"))
	}
}

// cmdInterrupt runs a program, sends it a signal once its output contains a
// text, and checks its exit code: interrupt SIGNAL TEXT CODE program args...
func cmdInterrupt(ts *testscript.TestScript, _ bool, args []string) {
	sig, text, code := args[0], args[1], args[2]
	cmd := exec.Command(args[3], args[4:]...)
	if p := filepath.Join(bin, args[3]); args[3] == "builder" || args[3] == "warmer" {
		cmd = exec.Command(p, args[4:]...)
	}
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "HOME="+ts.Getenv("HOME"), "WORK="+ts.MkAbs("."))
	out := &watcher{text: text, seen: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	ts.Check(cmd.Start())
	select {
	case <-out.seen:
	case <-time.After(30 * time.Second):
		cmd.Process.Kill()
		ts.Fatalf("%q never came:\n%s", text, out.all.String())
	}
	ts.Check(cmd.Process.Signal(unix.SignalNum(sig)))
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		ts.Fatalf("it did not end:\n%s", out.all.String())
	}
	got := cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		got = 128 + int(ws.Signal())
	}
	if strconv.Itoa(got) != code {
		ts.Fatalf("exit code %d, want %s:\n%s", got, code, out.all.String())
	}
	ts.Check(os.WriteFile(ts.MkAbs("output"), out.all.Bytes(), 0o644))
}

// watcher collects output and tells when a text has come.
type watcher struct {
	all  bytes.Buffer
	text string
	seen chan struct{}
	done bool
}

func (w *watcher) Write(p []byte) (int, error) {
	w.all.Write(p)
	if !w.done && strings.Contains(w.all.String(), w.text) {
		w.done = true
		close(w.seen)
	}
	return len(p), nil
}

// cmdExits runs a program and checks its exit code: exits CODE program args...
func cmdExits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if ee, ok := err.(*exec.ExitError); ok { // as exec returns it
		got = ee.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// scriptT is what imagetest needs of a testing.TB, for a script.
type scriptT struct {
	testing.TB
	ts   *testscript.TestScript
	undo []func()
}

func (t *scriptT) Helper()                           {}
func (t *scriptT) Fatal(args ...any)                 { t.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (t *scriptT) Fatalf(format string, args ...any) { t.ts.Fatalf(format, args...) }
func (t *scriptT) Errorf(format string, args ...any) { t.ts.Fatalf(format, args...) }
func (t *scriptT) Skip(args ...any)                  { t.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (t *scriptT) Cleanup(f func())                  { t.undo = append(t.undo, f) }
func (t *scriptT) Context() context.Context          { return context.Background() }

func (t *scriptT) TempDir() string {
	dir, err := os.MkdirTemp("", "ondol-script-")
	t.ts.Check(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (t *scriptT) cleanup() {
	for i := len(t.undo) - 1; i >= 0; i-- {
		t.undo[i]()
	}
	t.undo = nil
}
