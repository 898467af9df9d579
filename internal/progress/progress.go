// Package progress carries what happens in a build or a pull to whoever
// watches: as one stream of events, which printers turn into text for people
// or JSON for programs.
package progress

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Level says how much an event matters.
type Level int

// The levels, in the order of their weight. They have the names of Kaniko's.
const (
	Trace Level = iota
	Debug
	Info
	Warn
	Error
)

var levelNames = [...]string{"trace", "debug", "info", "warn", "error"}

func (l Level) String() string { return levelNames[l] }

// ParseLevel reads a level's name. Beside those of the constants it takes
// "warning", and "fatal" and "panic" for what is graver than an error.
func ParseLevel(s string) (Level, error) {
	switch s {
	case "warning":
		return Warn, nil
	case "fatal", "panic":
		return Error, nil
	}
	for i, n := range levelNames {
		if n == s {
			return Level(i), nil
		}
	}
	return 0, fmt.Errorf("unknown verbosity %q: use one of %s", s, strings.Join(levelNames[:], ", "))
}

// Kind says what an event is about.
type Kind string

// The kinds of events.
const (
	Message Kind = "message" // Text, said by nobody in particular
	Start   Kind = "start"   // Step begins
	Output  Kind = "output"  // Step has printed Text, one line
	Cached  Kind = "cached"  // Step was found in the cache: Text says where
	Done    Kind = "done"    // Step has ended well after Took
	Failed  Kind = "failed"  // Step has ended with Text
)

// An Event is something that has happened.
type Event struct {
	Time  time.Time
	Level Level
	Kind  Kind
	// Step numbers what the event is about, from 1, in the order in which the
	// steps have come up; 0 is none. Name is the step's.
	Step int
	Name string
	Text string
	Took time.Duration
}

// A Sink takes events. It is safe for concurrent use.
type Sink interface{ Emit(Event) }

// Discard is a Sink that does nothing.
var Discard Sink = discard{}

type discard struct{}

func (discard) Emit(Event) {}

// A Reporter makes events. The zero value is not usable; see New.
type Reporter struct {
	sink Sink
	last *atomic.Int64
}

// New returns a reporter of events to sink; nil discards them.
func New(sink Sink) *Reporter {
	if sink == nil {
		sink = Discard
	}
	return &Reporter{sink: sink, last: new(atomic.Int64)}
}

func (r *Reporter) message(l Level, format string, args ...any) {
	r.sink.Emit(Event{Time: time.Now(), Level: l, Kind: Message, Text: fmt.Sprintf(format, args...)})
}

// Debugf reports what helps to find a fault.
func (r *Reporter) Debugf(format string, args ...any) { r.message(Debug, format, args...) }

// Infof reports what every user wants to see.
func (r *Reporter) Infof(format string, args ...any) { r.message(Info, format, args...) }

// Warnf reports what the user should do something about.
func (r *Reporter) Warnf(format string, args ...any) { r.message(Warn, format, args...) }

// Step begins the report of a step. End it with one of Cached, Done and Failed.
func (r *Reporter) Step(name string) *Step {
	s := &Step{sink: r.sink, id: int(r.last.Add(1)), name: name, start: time.Now()}
	s.emit(Event{Level: Info, Kind: Start})
	return s
}

// A Step reports what one step does. As an io.Writer it takes the step's
// output, which it reports line by line.
type Step struct {
	sink  Sink
	id    int
	name  string
	start time.Time

	mu   sync.Mutex
	line []byte
}

func (s *Step) emit(e Event) {
	e.Time, e.Step, e.Name = time.Now(), s.id, s.name
	s.sink.Emit(e)
}

// maxLine bounds how long a line grows before it is reported in pieces.
const maxLine = 64 << 10

// Write implements io.Writer. It never fails.
func (s *Step) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range p {
		if b == '\n' || len(s.line) == maxLine {
			s.flush()
		}
		if b != '\n' {
			s.line = append(s.line, b)
		}
	}
	return len(p), nil
}

// flush reports the line at hand. What a terminal would have overwritten, as
// progress bars do, is left out.
func (s *Step) flush() {
	line := strings.TrimSuffix(string(s.line), "\r")
	if i := strings.LastIndexByte(line, '\r'); i >= 0 {
		line = line[i+1:]
	}
	s.emit(Event{Level: Info, Kind: Output, Text: line})
	s.line = s.line[:0]
}

// Printf reports a line as if the step had printed it.
func (s *Step) Printf(format string, args ...any) {
	fmt.Fprintf(s, format+"\n", args...)
}

func (s *Step) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.line) > 0 {
		s.flush()
	}
}

// Cached ends the step: it need not be done.
func (s *Step) Cached(where string) { s.emit(Event{Level: Info, Kind: Cached, Text: where}) }

// Done ends the step.
func (s *Step) Done() {
	s.rest()
	s.emit(Event{Level: Info, Kind: Done, Took: time.Since(s.start)})
}

// Failed ends the step with an error. The error itself is reported by whoever
// ends the build.
func (s *Step) Failed(err error) {
	s.rest()
	s.emit(Event{Level: Info, Kind: Failed, Text: err.Error(), Took: time.Since(s.start)})
}
