package build

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/buildkit/util/system"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/pkg/cache"
)

// dispatch evaluates the instructions of all stages that the target needs.
// After it, every stage has its state, and the steps are known with all that
// they depend on; nothing has been done yet.
func (p *plan) dispatch() error {
	for _, st := range p.needed() {
		st.state = p.newState(st)
		if !st.external {
			d := &dispatcher{plan: p, stage: st, state: st.state}
			if err := d.all(); err != nil {
				return err
			}
		}
		st.dispatched = true
	}
	return nil
}

// dispatcher evaluates the instructions of one stage.
type dispatcher struct {
	plan  *plan
	stage *stage
	state *state
	cmd   *command
	steps int // that have got a name
}

func (d *dispatcher) all() error {
	cfg := &d.state.config.Config
	if _, ok := shell.EnvsFromSlice(cfg.Env).Get("PATH"); !ok {
		cfg.Env = append(cfg.Env, "PATH="+system.DefaultPathEnvUnix)
	}
	d.state.cmdSet = false
	for _, kv := range cfg.Env {
		k, v, _ := strings.Cut(kv, "=")
		d.state.env.set(k, v)
	}
	if cfg.WorkingDir != "" {
		dir, err := system.NormalizeWorkdir(cfg.WorkingDir, cfg.WorkingDir, d.state.config.OS)
		if err != nil {
			return d.plan.file.errorAt(d.stage.where, err)
		}
		cfg.WorkingDir = dir
	}
	for i := range d.stage.commands {
		d.cmd = &d.stage.commands[i]
		if err := d.dispatch(); err != nil {
			return d.plan.file.errorAt(d.cmd.Location(), err)
		}
	}
	return nil
}

// dispatch evaluates one instruction. It is the only place that tells
// instructions apart.
func (d *dispatcher) dispatch() error {
	if err := d.expand(); err != nil {
		return err
	}
	switch c := d.cmd.Command.(type) {
	case *instructions.AddCommand:
		return d.dispatchAdd(c)
	case *instructions.ArgCommand:
		return d.dispatchArg(c)
	case *instructions.CmdCommand:
		return d.dispatchCmd(c)
	case *instructions.CopyCommand:
		return d.dispatchCopy(c)
	case *instructions.EntrypointCommand:
		return d.dispatchEntrypoint(c)
	case *instructions.EnvCommand:
		return d.dispatchEnv(c)
	case *instructions.ExposeCommand:
		return d.dispatchExpose(c)
	case *instructions.HealthCheckCommand:
		return d.dispatchHealthcheck(c)
	case *instructions.LabelCommand:
		return d.dispatchLabel(c)
	case *instructions.MaintainerCommand:
		return d.dispatchMaintainer(c)
	case *instructions.OnbuildCommand:
		return d.dispatchOnbuild(c)
	case *instructions.RunCommand:
		return d.dispatchRun(c)
	case *instructions.ShellCommand:
		return d.dispatchShell(c)
	case *instructions.StopSignalCommand:
		return d.dispatchStopSignal(c)
	case *instructions.UserCommand:
		return d.dispatchUser(c)
	case *instructions.VolumeCommand:
		return d.dispatchVolume(c)
	case *instructions.WorkdirCommand:
		return d.dispatchWorkdir(c)
	}
	return fmt.Errorf("%s is not supported", strings.ToUpper(d.cmd.Name()))
}

// expand replaces the variables in an instruction, where it has any. All words
// see the values from before it.
func (d *dispatcher) expand() error {
	if _, ok := d.cmd.Command.(*instructions.ArgCommand); ok {
		return nil // each word sees what those before it have set
	}
	if c, ok := d.cmd.Command.(instructions.SupportsSingleWordExpansion); ok {
		if err := c.Expand(d.word); err != nil {
			return err
		}
	}
	if c, ok := d.cmd.Command.(instructions.SupportsSingleWordExpansionRaw); ok {
		// Here-documents: quotes stay as they are, and the escape character is
		// always the backslash.
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		return c.ExpandRaw(func(word string) (string, error) {
			s, _, err := lex.ProcessWord(word, d.state.env)
			return s, err
		})
	}
	return nil
}

func (d *dispatcher) word(word string) (string, error) {
	s, _, err := d.plan.lex.ProcessWord(word, d.state.env)
	return s, err
}

// commit adds an entry to the image's history. step is nil for instructions
// that change no files.
func (d *dispatcher) commit(text string, step *step) {
	h := historyEntry{step: step}
	h.CreatedBy, h.Comment, h.EmptyLayer = text, historyComment, step == nil
	d.state.history = append(d.state.history, h)
}

// addStep makes a step of the instruction at hand, on top of the stage's
// files.
func (d *dispatcher) addStep(display string, o op) *step {
	d.steps++
	st := &step{
		stage: d.stage, where: d.cmd.Location(), text: strings.Join(strings.Fields(display), " "), number: d.steps,
		below: d.state.files, op: o, platform: d.state.platform(),
	}
	d.state.files = &fileSystem{below: d.state.files, step: st}
	return st
}

// source returns the files that the instruction's i-th source has, or an error
// if that stage comes only later.
func (d *dispatcher) source(i int) (*fileSystem, error) {
	src := d.cmd.sources[i]
	if !src.dispatched {
		return nil, fmt.Errorf("cannot copy from stage %q, it needs to be defined before current stage %q", d.plan.label(src), d.plan.label(d.stage))
	}
	return src.state.files, nil
}

// notYet is the error for what the language has and this version does not.
func notYet(what string) error {
	return errors.New(what + " is not supported yet")
}

// step is an instruction that changes files.
type step struct {
	stage    *stage
	where    []parser.Range
	text     string
	number   int // within the stage, from 1
	below    *fileSystem
	op       op
	platform ocispec.Platform

	key    call[cache.Key]
	recipe cache.Recipe
}
