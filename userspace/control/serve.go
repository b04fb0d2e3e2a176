package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxBody   = 64 << 10 // of a request
	maxHeader = 16 << 10 // of a request
)

// times are how long others may keep a server waiting.
type times struct {
	request time.Duration // to send one in
	stop    time.Duration // for requests under way when the daemon stops
}

// Serve answers requests until ctx ends, and closes l. Requests under way are told so by their context, and waited for a
// little.
func Serve(ctx context.Context, l net.Listener, h Handler, log *slog.Logger) error {
	return serve(ctx, l, h, log, times{request: 10 * time.Second, stop: 5 * time.Second})
}

func serve(ctx context.Context, l net.Listener, h Handler, log *slog.Logger, most times) error {
	requests, cancel := context.WithCancel(ctx)
	defer cancel()
	server := &http.Server{
		Handler:        newMux(h, log),
		ReadTimeout:    most.request, // of the request alone: carrying it out may take longer
		IdleTimeout:    time.Minute,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelError),
		BaseContext:    func(net.Listener) context.Context { return requests },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			peer, err := peerOf(conn)
			if err != nil {
				peer = nil
			}
			return context.WithValue(ctx, peerKey{}, peer)
		},
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the control socket: %w", err)
	case <-ctx.Done():
	}
	grace, end := context.WithTimeout(context.WithoutCancel(ctx), most.stop)
	defer end()
	err := server.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		log.Warn("requests at the control socket cut off: they did not end in time", "waited", most.stop)
		err = server.Close()
	}
	if failed := <-served; !errors.Is(failed, http.ErrServerClosed) {
		err = errors.Join(err, failed)
	}
	if err != nil {
		return fmt.Errorf("close the control socket: %w", err)
	}
	return nil
}

type peerKey struct{}

// request is what came over the socket, decoded.
type request interface{ check() error }

func newMux(h Handler, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+pathReload, handle(log, "reload", func(ctx context.Context, _ nothing) (any, error) {
		changes, err := h.Reload(ctx)
		return append([]string{}, changes...), err
	}))
	mux.Handle("POST "+pathDrain, handle(log, "drain", func(ctx context.Context, r DrainRequest) (any, error) {
		return nothing{}, h.Drain(ctx, r)
	}))
	mux.Handle("POST "+pathResume, handle(log, "resume", func(ctx context.Context, r resumeRequest) (any, error) {
		return nothing{}, h.Resume(ctx, r.Backend)
	}))
	mux.Handle("POST "+pathWeight, handle(log, "weight", func(ctx context.Context, r weightRequest) (any, error) {
		return nothing{}, h.Weight(ctx, r.Backend, r.Weight)
	}))
	mux.Handle("POST "+pathClose, handle(log, "close", func(ctx context.Context, r CloseRequest) (any, error) {
		return h.Close(ctx, r)
	}))
	mux.Handle("GET "+pathDrains, handle(log, "", func(ctx context.Context, _ nothing) (any, error) {
		drains, err := h.Drains(ctx)
		return append([]Drain{}, drains...), err
	}))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, fmt.Errorf("this daemon knows no %s %s: is it of another version than the command?",
			r.Method, r.URL.Path))
	})
	return mux
}

// handle decodes and checks a request, has it carried out and answers. What changes something has a name in the log.
func handle[R request](log *slog.Logger, name string, carryOut func(context.Context, R) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked, status, err := read[R](w, r)
		if err != nil {
			fail(w, status, err)
			return
		}
		if name != "" {
			text, _ := json.Marshal(asked) // it came as JSON
			attributes := []any{"command", name, "request", string(text)}
			if peer, ok := r.Context().Value(peerKey{}).(*unix.Ucred); ok && peer != nil {
				attributes = append(attributes, "uid", peer.Uid, "pid", peer.Pid)
			}
			log.Info("asked at the control socket", attributes...)
		}
		answer, err := carryOut(r.Context(), asked)
		if err != nil {
			if name != "" {
				log.Warn("refused at the control socket", "command", name, "err", err)
			}
			fail(w, http.StatusConflict, err)
			return
		}
		body, err := json.Marshal(answer)
		if err != nil {
			fail(w, http.StatusInternalServerError, fmt.Errorf("write the answer: %w", err))
			return
		}
		w.Header().Set("Content-Type", typeJSON)
		w.Write(body) // whoever went away does not read it
	})
}

// read is a request's body, whole, or why not.
func read[R request](w http.ResponseWriter, r *http.Request) (asked R, status int, err error) {
	var zero R
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var long *http.MaxBytesError
	if errors.As(err, &long) {
		return zero, http.StatusRequestEntityTooLarge, fmt.Errorf("the request is longer than %d bytes", long.Limit)
	}
	if err != nil {
		return zero, http.StatusBadRequest, fmt.Errorf("read the request: %w", err)
	}
	if asked, err = decode[R](body); err != nil {
		return zero, http.StatusBadRequest, err
	}
	return asked, http.StatusOK, nil
}

// decode reads a request's body; none at all is that of what takes no arguments. A field that is not known is refused: a
// later version would mean something by it.
func decode[R request](body []byte) (R, error) {
	var asked R
	if len(body) > 0 {
		var zero R
		if err := strictly(body, &asked); err != nil {
			return zero, fmt.Errorf("read the request: %w", err)
		}
	}
	return asked, asked.check()
}

func fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", typeText)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	io.WriteString(w, err.Error())
}

// strictly decodes one JSON value with no field that is not known, and nothing behind it.
func strictly(data []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return errors.New("something follows its end")
	}
	return nil
}
