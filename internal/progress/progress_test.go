package progress_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/ondol-dev/ondol/internal/progress"
)

func report(r *progress.Reporter) {
	r.Debugf("hidden")
	r.Infof("reading %s", "Dockerfile")
	s := r.Step("[1/2] RUN make")
	s.Write([]byte("one\ntwo"))
	s.Write([]byte(" halves\r\n10%\r100%\nlast"))
	s.Done()
	c := r.Step("[2/2] COPY . .")
	c.Cached("volume")
	f := r.Step("push")
	f.Failed(errors.New("no"))
	r.Warnf("careful")
}

func TestText(t *testing.T) {
	var b bytes.Buffer
	report(progress.New(progress.NewPrinter(&b, progress.Text, progress.Info)))
	want := `reading Dockerfile
#1 [1/2] RUN make
#1 one
#1 two halves
#1 100%
#1 last
#1 DONE 0.0s
#2 [2/2] COPY . .
#2 CACHED in volume
#3 push
#3 FAILED 0.0s
WARNING careful
`
	if b.String() != want {
		t.Errorf("got:\n%swant:\n%s", b.String(), want)
	}
	var c bytes.Buffer
	report(progress.New(progress.NewPrinter(&c, progress.Color, progress.Info)))
	if plain := regexp.MustCompile(`\x1b\[\d+m`).ReplaceAllString(c.String(), ""); plain != want || c.String() == want {
		t.Errorf("in colour:\n%s", c.String())
	}
	var w bytes.Buffer
	report(progress.New(progress.NewPrinter(&w, progress.Text, progress.Warn)))
	if w.String() != "WARNING careful\n" {
		t.Errorf("warnings only: %q", w.String())
	}
}

func TestJSON(t *testing.T) {
	var b bytes.Buffer
	report(progress.New(progress.NewPrinter(&b, progress.JSON, progress.Debug)))
	var kinds []string
	for line := range strings.Lines(b.String()) {
		var e struct{ Time, Level, Kind, Name, Msg string }
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Time == "" {
			t.Fatalf("%s: %v", line, err)
		}
		kinds = append(kinds, e.Level+" "+e.Kind+" "+e.Msg)
	}
	want := "debug message hidden|info message reading Dockerfile|info start |info output one|info output two halves|info output 100%|info output last|info done |info start |info cached volume|info start |info failed no|warn message careful"
	if got := strings.Join(kinds, "|"); got != want {
		t.Errorf("got %s", got)
	}
}

func TestParse(t *testing.T) {
	for _, s := range []string{"trace", "debug", "info", "warn", "warning", "error", "fatal", "panic"} {
		if _, err := progress.ParseLevel(s); err != nil {
			t.Error(err)
		}
	}
	if _, err := progress.ParseLevel("loud"); err == nil || !strings.Contains(err.Error(), "loud") {
		t.Errorf("%v", err)
	}
	if _, err := progress.ParseFormat("xml"); err == nil || !strings.Contains(err.Error(), "xml") {
		t.Errorf("%v", err)
	}
}
