package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Init does nothing unless the program was started by Run as the init process
// of a sandbox; then it never returns. Every program that calls Run must call
// it first in main, and every test that does, in TestMain.
func Init() {
	if len(os.Args) != 1 || os.Args[0] != initName {
		return
	}
	// Capabilities are dropped from one thread, which must be the one that
	// starts the process.
	runtime.LockOSThread()
	out := os.NewFile(reportFD, "report")
	r := runAsInit()
	json.NewEncoder(out).Encode(r)
	os.Exit(0) // the kernel kills what is left in the PID namespace
}

func runAsInit() report {
	closeOnExec()
	input, err := io.ReadAll(os.NewFile(specFD, "spec"))
	if err != nil {
		return report{Err: err.Error()}
	}
	var spec Spec
	if err := json.Unmarshal(input, &spec); err != nil {
		return report{Err: err.Error()}
	}
	go func() {
		io.Copy(io.Discard, os.NewFile(aliveFD, "alive"))
		os.Exit(0) // the builder is gone
	}()
	unix.Umask(0o022)
	root, err := enterRoot(&spec)
	if err != nil {
		return report{Err: err.Error()}
	}
	r := start(&spec)
	if err := root.leave(); err != nil && r.Err == "" {
		r.Err = err.Error()
	}
	return r
}

// closeOnExec keeps all open files from the process: ours, and whatever the
// builder's own parent has left open in it.
func closeOnExec() {
	if unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	// Linux before 5.11.
	names, _ := os.ReadDir("/proc/self/fd")
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// start runs the process and reaps everything until it has ended.
func start(spec *Spec) report {
	user, err := lookUpUser(spec.User)
	if err != nil {
		return report{Err: err.Error()}
	}
	env := withHome(spec.Env, user.home)
	if err := makeDir(spec.Dir, user.uid, user.gid); err != nil {
		return report{Err: fmt.Sprintf("working directory: %v", err)}
	}
	path, err := lookPath(spec.Args[0], env)
	if err != nil {
		return commandError(spec.Args[0], err)
	}
	if err := dropCapabilities(); err != nil {
		return report{Err: err.Error()}
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return report{Err: fmt.Sprintf("open /dev/null: %v", err)}
	}
	pid, err := syscall.ForkExec(path, spec.Args, &syscall.ProcAttr{
		Dir:   spec.Dir,
		Env:   env,
		Files: []uintptr{uintptr(null), 1, 2},
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Credential: &syscall.Credential{Uid: user.uid, Gid: user.gid, Groups: user.groups},
		},
	})
	if err != nil {
		return commandError(spec.Args[0], err)
	}
	status := reap(pid)
	if status.Signaled() {
		return report{Code: 128 + int(status.Signal()), Reason: "killed by " + unix.SignalName(status.Signal())}
	}
	return report{Code: status.ExitStatus()}
}

// commandError reports a command that cannot be executed, with the exit codes
// that a shell gives.
func commandError(name string, err error) report {
	code := 126
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		code = 127
	}
	return report{Code: code, Reason: fmt.Sprintf("exec %s: %v", name, err)}
}

// reap waits for all children, which as PID 1 are also the orphans, until pid
// ends; then it ends the others, so that nothing changes files any more when
// it returns.
func reap(pid int) syscall.WaitStatus {
	var result syscall.WaitStatus
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil: // no children are left
			return result
		case got == pid:
			result = status
			syscall.Kill(-1, syscall.SIGKILL)
		}
	}
}

// lookPath finds the command as execvp does, inside the root.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := ""
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	denied := false
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		full := dir + "/" + name
		fi, err := os.Stat(full)
		if err != nil || fi.IsDir() {
			continue
		}
		if fi.Mode()&0o111 != 0 {
			return full, nil
		}
		denied = true
	}
	if denied {
		return "", fmt.Errorf("found in $PATH, but not executable: %w", syscall.EACCES)
	}
	return "", fmt.Errorf("executable file not found in $PATH: %w", syscall.ENOENT)
}
