package progress

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Format is how a printer writes.
type Format string

// The formats of Kaniko's --log-format.
const (
	Text  Format = "text"
	Color Format = "color"
	JSON  Format = "json"
)

// ParseFormat reads a format's name.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case Text, Color, JSON:
		return f, nil
	}
	return "", fmt.Errorf("unknown log format %q: use text, color or json", s)
}

// A Printer writes events as lines. It is safe for concurrent use, and a line
// is never torn.
type Printer struct {
	// Level is the least weight that is printed.
	Level Level
	// Timestamps puts the time before each line of text.
	Timestamps bool

	w      io.Writer
	format Format
	mu     sync.Mutex
}

// NewPrinter returns a printer to w.
func NewPrinter(w io.Writer, f Format, level Level) *Printer {
	return &Printer{w: w, format: f, Level: level}
}

// Emit implements Sink.
func (p *Printer) Emit(e Event) {
	if e.Level < p.Level {
		return
	}
	var line []byte
	if p.format == JSON {
		line = jsonLine(e)
	} else {
		line = p.textLine(e)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.w.Write(line)
}

func jsonLine(e Event) []byte {
	v := struct {
		Time    time.Time `json:"time"`
		Level   string    `json:"level"`
		Kind    Kind      `json:"kind"`
		Step    int       `json:"step,omitempty"`
		Name    string    `json:"name,omitempty"`
		Text    string    `json:"msg,omitempty"`
		Seconds float64   `json:"seconds,omitempty"`
	}{e.Time, e.Level.String(), e.Kind, e.Step, e.Name, e.Text, e.Took.Seconds()}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Appendf(nil, "%q\n", e.Text)
	}
	return b.Bytes()
}

const (
	bold   = "\x1b[1m"
	red    = "\x1b[31m"
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	blue   = "\x1b[34m"
	reset  = "\x1b[0m"
)

func (p *Printer) textLine(e Event) []byte {
	var b bytes.Buffer
	paint := func(color, s string) string {
		if p.format == Color {
			return color + s + reset
		}
		return s
	}
	if p.Timestamps {
		b.WriteString(e.Time.Format(time.RFC3339) + " ")
	}
	if e.Step > 0 {
		b.WriteString(paint(blue, fmt.Sprintf("#%d", e.Step)) + " ")
	}
	switch e.Kind {
	case Start:
		b.WriteString(paint(bold, e.Name))
	case Cached:
		b.WriteString(paint(green, "CACHED") + in(e.Text))
	case Done:
		b.WriteString(paint(green, "DONE") + " " + seconds(e.Took))
	case Failed:
		b.WriteString(paint(red, "FAILED") + " " + seconds(e.Took))
	default:
		switch e.Level {
		case Warn:
			b.WriteString(paint(yellow, "WARNING") + " ")
		case Error:
			b.WriteString(paint(red, "ERROR") + " ")
		}
		b.WriteString(e.Text)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

func in(where string) string {
	if where == "" {
		return ""
	}
	return " in " + where
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1fs", d.Seconds()) }
