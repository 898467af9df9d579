package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/internal/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Init()
	os.Exit(m.Run())
}

// step is a sandbox on a root with a static busybox.
type step struct {
	t    *testing.T
	spec sandbox.Spec
	out  bytes.Buffer
}

func newStep(t *testing.T, script string) *step {
	t.Helper()
	imagetest.NeedRoot(t)
	lower := imagetest.BusyboxTree(t)
	dir := t.TempDir()
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := &step{t: t}
	s.spec = sandbox.Spec{
		Root:     sandbox.Rootfs{Lower: []string{lower}, Upper: dir + "/upper", Work: dir + "/work", MountPoint: dir + "/merged"},
		Args:     []string{"/bin/sh", "-c", script},
		Env:      []string{"PATH=/bin"},
		Dir:      "/",
		Hostname: "box",
		Stdout:   &s.out, Stderr: &s.out,
	}
	return s
}

func (s *step) run() error {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	return sandbox.Run(ctx, &s.spec)
}

// upper lists what the process has left in the upper directory.
func (s *step) upper() string {
	s.t.Helper()
	out, err := exec.Command("find", s.spec.Root.Upper, "-mindepth", "1", "-printf", "%P %y %m %U:%G\n").Output()
	if err != nil {
		s.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		change       func(*sandbox.Spec)
		want         string // the output
		code         int
		upper        string // what is left, if not "-"
	}{
		{name: "output", script: "echo out; echo err >&2", want: "out\nerr\n"},
		{name: "exit code", script: "exit 42", code: 42},
		{name: "killed by a signal", script: "kill -9 $$", code: 137},
		{name: "exec form", change: func(s *sandbox.Spec) { s.Args = []string{"echo", "a b", "$x"} }, want: "a b $x\n"},
		{name: "no such command", change: func(s *sandbox.Spec) { s.Args = []string{"nope"} }, code: 127},
		{name: "no such path", change: func(s *sandbox.Spec) { s.Args = []string{"/bin/nope"} }, code: 127},
		{name: "not executable", change: func(s *sandbox.Spec) { s.Args = []string{"/etc/passwd"} }, code: 126},
		{name: "environment", script: "env | sort", change: func(s *sandbox.Spec) { s.Env = append(s.Env, "A=1 2") },
			want: "A=1 2\nHOME=/root\nPATH=/bin\nPWD=/\nSHLVL=1\n"},
		{name: "environment given HOME", script: "echo $HOME", change: func(s *sandbox.Spec) { s.Env = append(s.Env, "HOME=/x") }, want: "/x\n"},
		{name: "standard input is empty", script: "cat; readlink /proc/self/fd/0", want: "/dev/null\n"},
		{name: "no other files are open", script: "cd /proc/self/fd; echo *", want: "0 1 2 3\n"}, // the last one is the shell's own
		{name: "user by name", script: "id -u; id -g; id -G; echo $HOME", change: func(s *sandbox.Spec) { s.User = "worker" }, want: "1000\n100\n100 20\n/home/worker\n"},
		{name: "user and group", script: "id -u; id -G", change: func(s *sandbox.Spec) { s.User = "worker:staff" }, want: "1000\n20\n"},
		{name: "unknown number", script: "id -u; id -g; echo $HOME", change: func(s *sandbox.Spec) { s.User = "4321" }, want: "4321\n0\n/\n"},
		{name: "working directory is made", script: "pwd; stat -c %u /new /new/dir", change: func(s *sandbox.Spec) { s.Dir, s.User = "/new/dir", "worker" },
			want: "/new/dir\n1000\n1000\n", upper: "new d 755 1000:100\nnew/dir d 755 1000:100"},
		{name: "hostname", script: "hostname", want: "box\n"},
		{name: "umask", script: "umask", want: "0022\n"},
		{name: "capabilities", script: "grep CapEff /proc/self/status; grep CapBnd /proc/self/status; grep CapInh /proc/self/status; grep NoNewPrivs /proc/self/status",
			want: "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nCapInh:\t0000000000000000\nNoNewPrivs:\t0\n"},
		{name: "capabilities of a user", script: "grep CapEff /proc/self/status", change: func(s *sandbox.Spec) { s.User = "worker" }, want: "CapEff:\t0000000000000000\n"},
		{name: "changes go to the upper directory", script: "echo x > /f; rm /etc/group; mkdir -m 700 /d", upper: "d d 700 0:0\netc d 755 0:0\netc/group c 0 0:0\nf f 644 0:0"},
		{name: "nothing is left of the surroundings", script: "ls /dev/null /proc/1 /sys/class >/dev/null", upper: ""},
		{name: "devices", script: "echo x >/dev/null && head -c 4 /dev/zero | wc -c && head -c 4 /dev/urandom | wc -c && ls -d /dev/pts/ptmx /dev/shm && echo y | cat /dev/stdin", want: "4\n4\n/dev/pts/ptmx\n/dev/shm\ny\n"},
		{name: "proc is its own", script: "ls -d /proc/[0-9]* | wc -l; readlink /proc/self/exe", want: "4\n/bin/busybox\n"},
		{name: "proc is masked", script: "ls /sys/firmware | wc -l; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo refused", want: "0\nrefused\n"},
		{name: "sys is read-only", script: "mkdir /sys/kernel/x 2>/dev/null || echo refused", want: "refused\n"},
		{name: "no mount", script: "mount -t tmpfs x /mnt 2>/dev/null || echo refused", want: "refused\n"},
		{name: "orphans are reaped, daemons end", script: "for i in 1 2 3; do (sleep 0 &); done; setsid sleep 1000 & sleep 0.1; echo done", want: "done\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStep(t, tt.script)
			if tt.change != nil {
				tt.change(&s.spec)
			}
			start := time.Now()
			err := s.run()
			var exit *sandbox.ExitError
			switch {
			case tt.code == 0 && err != nil:
				t.Errorf("error: %v", err)
			case tt.code != 0 && (!errors.As(err, &exit) || exit.Code != tt.code):
				t.Errorf("error %v, want exit code %d", err, tt.code)
			}
			if tt.code == 0 && s.out.String() != tt.want {
				t.Errorf("output %q, want %q", s.out.String(), tt.want)
			}
			if tt.upper != "" && s.upper() != tt.upper {
				t.Errorf("upper directory:\n%s\nwant:\n%s", s.upper(), tt.upper)
			}
			if d := time.Since(start); d > 15*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

func TestMounts(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(file, []byte("127.0.0.1 me\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := newStep(t, "cat /etc/hosts /deep/er/file /link; echo x 2>/dev/null >/etc/hosts || echo refused; echo x >/deep/er/kept/y; stat -c %Y /etc")
	etc := filepath.Join(s.spec.Root.Lower[0], "etc")
	before, err := os.Stat(etc)
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"/etc/hosts", "/deep/er/file", "/link", "/deep/er/kept/z"} {
		s.spec.Mounts = append(s.spec.Mounts, sandbox.Mount{Source: file, Target: target, ReadOnly: true})
	}
	if err := s.run(); err != nil {
		t.Fatal(err, s.out.String())
	}
	want := strings.Repeat("127.0.0.1 me\n", 3) + "refused\n" + itoa(before.ModTime().Unix()) + "\n"
	if s.out.String() != want {
		t.Errorf("output %q, want %q", s.out.String(), want)
	}
	// /link leads to /not/there/yet, which was made and is gone again. What
	// the process has filled stays.
	wantUpper := "deep d 755 0:0\ndeep/er d 755 0:0\ndeep/er/kept d 755 0:0\ndeep/er/kept/y f 644 0:0\netc d 755 0:0"
	if got := s.upper(); got != wantUpper {
		t.Errorf("upper directory:\n%s\nwant:\n%s", got, wantUpper)
	}
	after, err := os.Stat(filepath.Join(s.spec.Root.Upper, "etc"))
	if err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("time of /etc: %v, want %v", after.ModTime(), before.ModTime())
	}
}

func TestScratch(t *testing.T) {
	t.Parallel()
	s := newStep(t, "")
	busybox, err := os.ReadFile(filepath.Join(s.spec.Root.Lower[0], "bin/busybox"))
	if err != nil {
		t.Fatal(err)
	}
	s.spec.Root.Lower = nil
	if err := os.WriteFile(filepath.Join(s.spec.Root.Upper, "busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	s.spec.Args = []string{"/busybox", "echo", "hi"}
	if err := s.run(); err != nil || s.out.String() != "hi\n" {
		t.Fatalf("%q, %v", s.out.String(), err)
	}
	if want := "busybox f 755 0:0\ndev d 755 0:0\nproc d 755 0:0\nsys d 755 0:0"; s.upper() != want {
		t.Errorf("upper directory:\n%s\nwant:\n%s", s.upper(), want)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s := newStep(t, "setsid sleep 12345 & echo started; sleep 12345")
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	time.AfterFunc(300*time.Millisecond, func() { cancel(stop) })
	start := time.Now()
	if err := sandbox.Run(ctx, &s.spec); !errors.Is(err, stop) {
		t.Errorf("error %v, want %v", err, stop)
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("took %v to stop", d)
	}
	out, _ := exec.Command("pgrep", "-f", "sleep 12345").Output()
	if len(out) > 0 {
		t.Errorf("processes are left: %s", out)
	}
}

// TestHostileRoot runs in roots whose /proc, /dev and /etc lead elsewhere:
// nothing outside may be mounted on, made or removed.
func TestHostileRoot(t *testing.T) {
	for _, dir := range []string{"proc", "dev", "sys", "etc"} {
		t.Run(dir, func(t *testing.T) {
			t.Parallel()
			s := newStep(t, "true")
			outside := t.TempDir()
			evil := t.TempDir()
			if err := os.Symlink(outside, filepath.Join(evil, dir)); err != nil {
				t.Fatal(err)
			}
			s.spec.Root.Lower = append([]string{evil}, s.spec.Root.Lower...)
			file := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(file, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			s.spec.Mounts = []sandbox.Mount{{Source: file, Target: "/etc/resolv.conf"}}
			err := s.run()
			names, _ := os.ReadDir(outside)
			if len(names) != 0 {
				t.Errorf("files outside: %v (%v)", names, err)
			}
			mounts, _ := os.ReadFile("/proc/self/mountinfo")
			if strings.Contains(string(mounts), outside) || strings.Contains(string(mounts), evil) {
				t.Errorf("a mount is left")
			}
		})
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
