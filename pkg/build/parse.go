package build

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// dockerfile is a parsed Dockerfile. Expressions are not expanded yet.
type dockerfile struct {
	name    string // for messages
	content []byte
	escape  rune
	stages  []instructions.Stage
	args    []instructions.ArgCommand // before the first FROM
}

// parseDockerfile parses content. warn takes what is not wrong but unwise.
func parseDockerfile(name string, content []byte, warn func(line int, text string)) (*dockerfile, error) {
	d := &dockerfile{name: name, content: content}
	if len(content) == 0 {
		return nil, fmt.Errorf("%s: the Dockerfile cannot be empty", name)
	}
	ast, err := parser.Parse(bytes.NewReader(content))
	if err != nil {
		return nil, d.named(err)
	}
	d.escape = ast.EscapeToken
	lint := linter.New(&linter.Config{Warn: func(rule, _, _, msg string, where []parser.Range) {
		line := 0
		if len(where) > 0 {
			line = where[0].Start.Line
		}
		warn(line, fmt.Sprintf("%s: %s", rule, msg))
	}})
	d.stages, d.args, err = instructions.Parse(ast.AST, lint)
	if err != nil {
		return nil, d.named(err)
	}
	if len(d.stages) == 0 {
		return nil, fmt.Errorf("%s: the Dockerfile contains no stages to build", name)
	}
	return d, nil
}

// named makes sure that an error says at least in which Dockerfile it is.
func (d *dockerfile) named(err error) error {
	if err == nil {
		return nil
	}
	err = d.locate(err)
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return fmt.Errorf("%s: %w", d.name, err)
}

// ReadDockerfile finds and reads a Dockerfile: at path as it is, or else below
// the context directory. Where the file is to be called Dockerfile, dockerfile
// does too.
func ReadDockerfile(path, context string) (found string, content []byte, err error) {
	try := []string{path}
	if !filepath.IsAbs(path) {
		try = append(try, filepath.Join(context, path))
	}
	if filepath.Base(path) == "Dockerfile" {
		for _, p := range try {
			try = append(try, filepath.Join(filepath.Dir(p), "dockerfile"))
		}
	}
	for _, p := range try {
		content, err := os.ReadFile(p)
		if err == nil {
			return p, content, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", nil, fmt.Errorf("read Dockerfile: %w", err)
		}
	}
	return "", nil, fmt.Errorf("read Dockerfile: there is none at %s", strings.Join(try, " or "))
}
