package build

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// An Error is a failure that belongs to a place in the Dockerfile.
type Error struct {
	// File is the Dockerfile, and Line the first line that is meant, from 1.
	File string
	Line int
	// Source holds the lines around it, each with its number, and a mark at
	// those that are meant.
	Source string
	Err    error
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s:%d: %v", e.File, e.Line, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// locate makes an Error of err if it knows where in the Dockerfile it belongs.
func (d *dockerfile) locate(err error) error {
	if err == nil {
		return nil
	}
	var done *Error
	if errors.As(err, &done) {
		return err
	}
	var le *parser.LocationError
	if !errors.As(err, &le) || len(le.Locations) == 0 || len(le.Locations[0]) == 0 {
		return err
	}
	return d.errorAt(le.Locations[0], err)
}

// errorAt says that err belongs to a place in the Dockerfile.
func (d *dockerfile) errorAt(where []parser.Range, err error) error {
	if err == nil || len(where) == 0 {
		return err
	}
	var done *Error
	if errors.As(err, &done) {
		return err
	}
	first, last := where[0].Start.Line, where[0].End.Line
	for _, r := range where {
		first, last = min(first, r.Start.Line), max(last, r.End.Line)
	}
	return &Error{File: d.name, Line: first, Source: d.excerpt(first, last), Err: unnumbered{err}}
}

// unnumbered is an error without the line that the parser puts in front of
// some of its messages: the Error around it has it.
type unnumbered struct{ err error }

func (e unnumbered) Error() string {
	if _, rest, ok := strings.Cut(e.err.Error(), "dockerfile parse error on line "); ok {
		if _, text, ok := strings.Cut(rest, ": "); ok {
			return text
		}
	}
	return e.err.Error()
}

func (e unnumbered) Unwrap() error { return e.err }

// around is how many lines are shown before and after those that are meant.
const around = 2

// excerpt shows lines first to last, counted from 1.
func (d *dockerfile) excerpt(first, last int) string {
	lines := strings.Split(string(bytes.TrimSuffix(d.content, []byte("\n"))), "\n")
	if first < 1 || first > len(lines) {
		return ""
	}
	last = min(last, len(lines))
	var b strings.Builder
	for n := max(1, first-around); n <= min(len(lines), last+around); n++ {
		mark := "   "
		if n >= first && n <= last {
			mark = ">>>"
		}
		fmt.Fprintf(&b, "%4d | %s %s\n", n, mark, strings.TrimSuffix(lines[n-1], "\r"))
	}
	return b.String()
}
