package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// initName is the name under which a program executes itself as init.
const initName = "ondol-init"

// The files that init inherits beside its standard ones.
const (
	specFD   = 3 // the Spec as JSON
	reportFD = 4 // takes a report as JSON when the process has ended
	aliveFD  = 5 // at its end when the builder is gone
)

// report is what init tells about the process.
type report struct {
	// Err is set if the process could not be started for a reason that is not
	// the command's own.
	Err    string `json:",omitempty"`
	Code   int
	Reason string `json:",omitempty"`
}

// Run runs the process and waits for it and all that it has started to end. It
// returns an *ExitError if the process ran and failed, and any other error if
// it could not be run. When ctx ends, everything is killed at once.
func Run(ctx context.Context, spec *Spec) error {
	input, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	var pipes pipes
	defer pipes.close()
	specR, specW := pipes.open()
	reportR, reportW := pipes.open()
	aliveR, _ := pipes.open()
	if pipes.err != nil {
		return fmt.Errorf("start sandbox: %w", pipes.err)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{initName}
	cmd.Env = []string{"GODEBUG=madvdontneed=1"} // never the builder's own
	cmd.Stdout, cmd.Stderr = spec.Stdout, spec.Stderr
	cmd.ExtraFiles = []*os.File{specR, reportW, aliveR}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// No Pdeathsig: in a new PID namespace it does nothing on Linux and
		// kills the child at once on gVisor. Init watches aliveFD instead.
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setsid:     true, // a terminal's ^C is for the builder to handle
	}
	// Output ends when init does, because that ends the PID namespace.
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.EPERM) {
			err = fmt.Errorf("%w: making namespaces needs CAP_SYS_ADMIN", err)
		}
		return fmt.Errorf("start sandbox: %w", err)
	}
	specR.Close()
	reportW.Close()
	aliveR.Close()
	if _, err := specW.Write(input); err != nil && !errors.Is(err, syscall.EPIPE) {
		cmd.Process.Kill()
	}
	specW.Close()
	said, readErr := io.ReadAll(reportR)
	waitErr := cmd.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var r report
	switch {
	case readErr != nil:
		return fmt.Errorf("run in sandbox: %w", readErr)
	case len(bytes.TrimSpace(said)) == 0:
		return fmt.Errorf("run in sandbox: init ended without a report: %w", waitErr)
	}
	if err := json.Unmarshal(said, &r); err != nil {
		return fmt.Errorf("run in sandbox: init's report: %w", err)
	}
	if r.Err != "" {
		return fmt.Errorf("start sandbox: %s", r.Err)
	}
	if r.Code != 0 {
		return &ExitError{Code: r.Code, Reason: r.Reason}
	}
	return nil
}

// pipes opens several pipes and closes what is left of them.
type pipes struct {
	files []*os.File
	err   error
}

func (p *pipes) open() (r, w *os.File) {
	r, w, err := os.Pipe()
	if err != nil {
		p.err = err
		return nil, nil
	}
	p.files = append(p.files, r, w)
	return r, w
}

func (p *pipes) close() {
	for _, f := range p.files {
		f.Close()
	}
}
