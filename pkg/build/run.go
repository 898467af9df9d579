package build

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/sandbox"
	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// dispatchRun runs a command on the stage's files.
func (d *dispatcher) dispatchRun(c *instructions.RunCommand) error {
	switch {
	case len(instructions.GetMounts(c)) > 0:
		return notYet("RUN --mount")
	case instructions.GetNetwork(c) != instructions.NetworkDefault:
		return notYet("RUN --network=" + string(instructions.GetNetwork(c)))
	case instructions.GetSecurity(c) != instructions.SecuritySandbox:
		return notYet("RUN --security=" + string(instructions.GetSecurity(c)))
	case len(instructions.GetDevices(c)) > 0:
		return notYet("RUN --device")
	}
	o := &runOp{user: d.state.config.Config.User, dir: d.state.config.Config.WorkingDir}
	args := []string(c.CmdLine)
	if len(c.Files) > 0 {
		var err error
		if args, err = d.runDocuments(c, o); err != nil {
			return err
		}
	}
	if c.PrependShell && o.script == nil {
		args = d.state.withShell(args)
	}
	o.args = args
	// Declared arguments belong to the environment that the command sees; they
	// are in it already, in the order in which they were set.
	o.env = d.state.env.list()
	st := d.addStep(c.String(), o)
	d.commit("RUN "+d.runHistory(args)+" # buildkit", st)
	return nil
}

// runDocuments handles here-documents. One alone is a script: for the
// interpreter that its first line names, or else for the shell. Several, or
// one with something around it, go to the shell as they are written.
func (d *dispatcher) runDocuments(c *instructions.RunCommand, o *runOp) ([]string, error) {
	args := []string(c.CmdLine)
	if len(args) != 1 || !c.PrependShell {
		return nil, fmt.Errorf("parsing produced an invalid run command: %v", args)
	}
	if parser.MustParseHeredoc(args[0]) == nil {
		var b strings.Builder
		b.WriteString(args[0])
		for _, f := range c.Files {
			b.WriteByte('\n')
			b.WriteString(f.Data)
			b.WriteString(f.Name)
		}
		return []string{b.String()}, nil
	}
	data := c.Files[0].Data
	if c.Files[0].Chomp {
		data = parser.ChompHeredocContent(data)
	}
	if !strings.HasPrefix(data, "#!") {
		return []string{data}, nil
	}
	o.script = &script{name: c.Files[0].Name, content: data}
	return d.state.withShell([]string{path.Join(scriptDir, c.Files[0].Name)}), nil
}

// runHistory is how the history shows a command: with the declared arguments
// and the values that it sees.
func (d *dispatcher) runHistory(args []string) string {
	var said []string
	at := map[string]int{}
	for _, a := range d.state.args {
		v, ok := d.state.env.Get(a.Key)
		if !ok {
			v = a.ValueString()
		}
		if i, ok := at[a.Key]; ok {
			said[i] = a.Key + "=" + v
			continue
		}
		at[a.Key] = len(said)
		said = append(said, a.Key+"="+v)
	}
	if len(said) > 0 {
		said = append([]string{fmt.Sprintf("|%d", len(said))}, said...)
	}
	return strings.Join(append(said, args...), " ")
}

// scriptDir is where a command finds the script that is its here-document.
const scriptDir = "/dev/pipes"

type script struct{ name, content string }

// runOp is a command.
type runOp struct {
	args   []string
	env    []string
	dir    string
	user   string
	script *script
}

func (o *runOp) sources() []*fileSystem { return nil }

// define adds what the command sees. The order of variables does not matter.
func (o *runOp) define(_ context.Context, _ *solver, r *cache.Recipe) error {
	r.Add("instruction", "RUN")
	for _, a := range o.args {
		r.Add("argument", a)
	}
	for _, kv := range slices.Sorted(slices.Values(o.env)) {
		name, value, _ := strings.Cut(kv, "=")
		r.Add("variable "+name, value)
	}
	r.Add("user", o.user)
	r.Add("directory", o.dir)
	if o.script != nil {
		r.Add("script", o.script.content)
	}
	return nil
}

// sandboxHostname is the name of the machine that commands see. It is
// BuildKit's, since it can get into files.
const sandboxHostname = "buildkitsandbox"

func (o *runOp) run(ctx context.Context, e *execution) (*layer, error) {
	s := e.solver
	trees, err := s.trees(ctx, e.below)
	if err != nil {
		return nil, err
	}
	upper, err := s.b.opts.Volume.NewTreeDir()
	if err != nil {
		return nil, err
	}
	spec, cleanup, err := o.spec(e, trees, upper)
	if err != nil {
		return nil, err
	}
	defer cleanup()
	if err := s.b.opts.Run(ctx, spec); err != nil {
		return nil, fmt.Errorf("process %q did not complete successfully: %w%s", strings.Join(o.args, " "), err, s.fullDisk())
	}
	l := &layer{blob: newPromise[cache.Layer](), fresh: true, created: s.b.opts.Now().UTC(), upper: upper}
	e.finish(l, func(ctx context.Context) ([]snapshot.Change, error) {
		return snapshot.ScanUpper(ctx, upper, snapshot.NewTreeView(trees))
	})
	return l, nil
}

// fullDisk explains the failure of a command whose changes have filled the
// disk: the kernel tells the command as little as "I/O error".
func (s *solver) fullDisk() string {
	var st unix.Statfs_t
	dir := s.b.opts.Volume.Dir()
	if unix.Statfs(dir, &st) != nil {
		return ""
	}
	const little = 1 << 20
	if st.Bavail*uint64(st.Bsize) > little && (st.Files == 0 || st.Ffree > 0) { // the types depend on the architecture
		return ""
	}
	return fmt.Sprintf(" (there is no space left on the disk of %s)", dir)
}

// spec prepares everything that the sandbox needs. cleanup removes it again.
func (o *runOp) spec(e *execution, trees []string, upper string) (spec *sandbox.Spec, cleanup func(), err error) {
	tmp, err := e.solver.b.opts.Volume.TempDir("run-")
	if err != nil {
		return nil, nil, err
	}
	cleanup = func() { os.RemoveAll(tmp) }
	spec = &sandbox.Spec{
		Root: sandbox.Rootfs{Lower: slices.Clone(trees), Upper: upper, Work: filepath.Join(tmp, "work"), MountPoint: filepath.Join(tmp, "root")},
		Args: o.args, Env: o.env, Dir: o.dir, User: o.user, Hostname: sandboxHostname,
		Stdout: e.report, Stderr: e.report,
	}
	slices.Reverse(spec.Root.Lower)
	if spec.Dir == "" {
		spec.Dir = "/"
	}
	for _, dir := range []string{spec.Root.Work, spec.Root.MountPoint} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			cleanup()
			return nil, nil, err
		}
	}
	files := []struct{ target, content string }{
		{"/etc/resolv.conf", resolvConf()},
		{"/etc/hosts", "127.0.0.1\tlocalhost " + sandboxHostname + "\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
	}
	for i, f := range files {
		source := filepath.Join(tmp, fmt.Sprintf("file%d", i))
		if err := writeFile(source, f.content, 0o644); err != nil {
			cleanup()
			return nil, nil, err
		}
		spec.Mounts = append(spec.Mounts, sandbox.Mount{Source: source, Target: f.target, ReadOnly: true})
	}
	if o.script != nil {
		dir := filepath.Join(tmp, "pipes")
		if err := os.Mkdir(dir, 0o755); err != nil {
			cleanup()
			return nil, nil, err
		}
		if err := writeFile(filepath.Join(dir, o.script.name), o.script.content, 0o755); err != nil {
			cleanup()
			return nil, nil, err
		}
		spec.Mounts = append(spec.Mounts, sandbox.Mount{Source: dir, Target: scriptDir, ReadOnly: true})
	}
	return spec, cleanup, nil
}

// writeFile makes a file with a mode that does not depend on the umask.
func writeFile(path, content string, mode os.FileMode) error {
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// resolvConf is what commands find name servers with: the machine's own file,
// but not one that leads to a resolver on the loopback interface which systemd
// offers, when there is the file with what is behind it.
func resolvConf() string {
	b, err := os.ReadFile("/etc/resolv.conf")
	if err == nil && strings.Contains(string(b), "127.0.0.53") {
		if real, err := os.ReadFile("/run/systemd/resolve/resolv.conf"); err == nil {
			b = real
		}
	}
	return string(b)
}
