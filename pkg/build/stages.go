package build

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/buildkit/util/suggest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// scratch is the name of the base that is no image.
const scratch = "scratch"

// plan is the graph of stages that a build consists of, and then, when it has
// been dispatched, the steps and configs that they amount to.
type plan struct {
	file    *dockerfile
	req     *Request
	targets targets
	lex     *shell.Lex
	globals *environment // ARGs before the first FROM, and platform arguments
	stages  []*stage     // in the order in which they are dispatched
	byName  map[string]*stage
	target  *stage
}

// stage is one FROM with what follows it, or an image that an instruction
// takes files from.
type stage struct {
	name     string // lower-case, "" if it has none
	base     string // what FROM names, expanded
	where    []parser.Range
	platform *ocispec.Platform // what FROM --platform asks for
	commands []command
	from     *stage     // the stage that this one starts from
	image    *baseImage // or the image; nil for scratch
	needs    []*stage   // other stages that instructions take files from
	external bool       // an image that is named by an instruction only

	onbuildDone bool
	dispatched  bool
	state       *state
}

// command is an instruction with the stages that it takes files from.
type command struct {
	instructions.Command
	sources []*stage // by mount for RUN, one at most for COPY
	onbuild bool
}

// newPlan makes the graph of the stages that the target needs. Base images
// are not resolved yet.
func newPlan(file *dockerfile, req *Request) (*plan, error) {
	p := &plan{
		file: file, req: req, targets: newTargets(req.Platform), lex: shell.NewLex(file.escape),
		byName: map[string]*stage{},
	}
	if err := p.expandGlobals(); err != nil {
		return nil, err
	}
	for i := range file.stages {
		st, err := p.newStage(&file.stages[i])
		if err != nil {
			return nil, file.errorAt(file.stages[i].Location, err)
		}
		p.add(st)
	}
	if err := p.findTarget(); err != nil {
		return nil, err
	}
	for _, st := range slices.Clone(p.stages) {
		for i := range st.commands {
			if err := p.link(st, &st.commands[i]); err != nil {
				return nil, file.errorAt(st.commands[i].Location(), err)
			}
		}
	}
	return p, p.checkCycles()
}

// expandGlobals evaluates the ARGs before the first FROM.
func (p *plan) expandGlobals() error {
	target := p.req.Target
	if target == "" {
		target = p.file.stages[len(p.file.stages)-1].Name
	}
	p.globals = &environment{}
	for _, kv := range p.targets.args(target) {
		v := kv[1]
		if given, ok := p.req.BuildArgs[kv[0]]; ok {
			v = given
		}
		p.globals.set(kv[0], v)
	}
	for i := range p.file.args {
		cmd := &p.file.args[i]
		for _, arg := range cmd.Args {
			value := arg.Value
			if given, ok := p.req.BuildArgs[arg.Key]; ok {
				value = &given
			} else if value != nil {
				v, _, err := p.lex.ProcessWord(*value, p.globals)
				if err != nil {
					return p.file.errorAt(cmd.Location(), err)
				}
				value = &v
			}
			if value != nil {
				p.globals.set(arg.Key, *value)
			}
		}
	}
	return nil
}

// newStage evaluates a FROM.
func (p *plan) newStage(in *instructions.Stage) (*stage, error) {
	base, _, err := p.lex.ProcessWord(in.BaseName, p.globals)
	if err != nil {
		return nil, err
	}
	if base == "" {
		return nil, fmt.Errorf("base name (%s) should not be blank", in.BaseName)
	}
	st := &stage{name: strings.ToLower(in.Name), base: base, where: in.Location}
	if in.Platform != "" {
		text, _, err := p.lex.ProcessWord(in.Platform, p.globals)
		if err != nil {
			return nil, fmt.Errorf("platform %s: %w", in.Platform, err)
		}
		if text == "" {
			return nil, fmt.Errorf("empty platform value from expression %s", in.Platform)
		}
		spec, err := platforms.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("failed to parse platform %s: %w", in.Platform, err)
		}
		st.platform = &spec
	}
	for _, c := range in.Commands {
		st.commands = append(st.commands, command{Command: c})
	}
	return st, nil
}

// add appends a stage. It starts from the latest earlier stage that has the
// name of its base.
func (p *plan) add(st *stage) {
	st.from = p.byName[strings.ToLower(st.base)]
	p.stages = append(p.stages, st)
	if st.name != "" {
		p.byName[st.name] = st
	}
}

// findTarget finds the stage to build.
func (p *plan) findTarget() error {
	if p.req.Target == "" {
		p.target = p.stages[len(p.stages)-1]
		return nil
	}
	st, ok := p.byName[strings.ToLower(p.req.Target)]
	if !ok {
		return suggest.WrapError(fmt.Errorf("target stage %q could not be found", p.req.Target), p.req.Target, p.names(), true)
	}
	p.target = st
	return nil
}

func (p *plan) names() []string {
	var out []string
	for _, st := range p.stages {
		if st.name != "" {
			out = append(out, st.name)
		}
	}
	return out
}

// link finds the stages that an instruction takes files from.
func (p *plan) link(st *stage, cmd *command) error {
	var names []string
	switch c := cmd.Command.(type) {
	case *instructions.CopyCommand:
		if c.From != "" {
			names = []string{c.From}
		}
	case *instructions.RunCommand:
		for _, m := range instructions.GetMounts(c) {
			names = append(names, m.From)
		}
	}
	cmd.sources = make([]*stage, len(names))
	for i, name := range names {
		if name == "" {
			continue
		}
		src, err := p.source(name, cmd)
		if err != nil {
			return err
		}
		cmd.sources[i] = src
		st.needs = append(st.needs, src)
	}
	return nil
}

// source returns the stage called name, by its number for COPY, or a new one
// for the image of that name.
func (p *plan) source(name string, cmd *command) (*stage, error) {
	expanded, _, err := p.lex.ProcessWord(name, &environment{})
	if err != nil {
		return nil, err
	}
	if expanded != name {
		return nil, errors.New("variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround")
	}
	if _, ok := cmd.Command.(*instructions.CopyCommand); ok {
		if n, err := strconv.Atoi(name); err == nil {
			if n < 0 || n >= len(p.file.stages) {
				return nil, fmt.Errorf("invalid stage index %d", n)
			}
			return p.stages[n], nil
		}
	}
	if st, ok := p.byName[strings.ToLower(name)]; ok {
		return st, nil
	}
	st := &stage{base: name, where: cmd.Location(), external: true}
	p.stages = append(p.stages, st)
	return st, nil
}

// checkCycles refuses stages that need themselves.
func (p *plan) checkCycles() error {
	const visiting, done = 1, 2
	marks := map[*stage]int{}
	var visit func(*stage) error
	visit = func(st *stage) error {
		switch marks[st] {
		case visiting:
			return p.file.errorAt(st.where, fmt.Errorf("circular dependency detected on stage: %s", p.label(st)))
		case done:
			return nil
		}
		marks[st] = visiting
		for _, d := range st.dependencies() {
			if err := visit(d); err != nil {
				return err
			}
		}
		marks[st] = done
		return nil
	}
	for _, st := range p.stages {
		if err := visit(st); err != nil {
			return err
		}
	}
	return nil
}

// dependencies are all stages that a stage needs directly.
func (st *stage) dependencies() []*stage {
	if st.from == nil {
		return st.needs
	}
	return append([]*stage{st.from}, st.needs...)
}

// label is how messages call a stage.
func (p *plan) label(st *stage) string {
	if st.name != "" {
		return st.name
	}
	for i, s := range p.stages {
		if s == st && !st.external {
			return "stage-" + strconv.Itoa(i)
		}
	}
	return st.base
}

// needed returns the stages that the target needs, itself included, in the
// order in which they are dispatched.
func (p *plan) needed() []*stage {
	seen := map[*stage]bool{}
	var visit func(*stage)
	visit = func(st *stage) {
		if seen[st] {
			return
		}
		seen[st] = true
		for _, d := range st.dependencies() {
			visit(d)
		}
	}
	visit(p.target)
	var out []*stage
	// Images that are only taken files from have no instructions: they come
	// first, so that whoever needs them finds them.
	for _, external := range []bool{true, false} {
		for _, st := range p.stages {
			if seen[st] && st.external == external {
				out = append(out, st)
			}
		}
	}
	return out
}
