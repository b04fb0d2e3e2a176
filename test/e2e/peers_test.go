package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"fairlead/test/lab"
)

var bulk = flag.Int64("bulk", 256<<20, "bytes that go each way through the service in TestPeers")

const (
	httpPort  = 8080
	iperfPort = 5201
)

// TestPeers is traffic between programs that nobody here wrote: Python's websockets behind the service, Node's ws in
// front of it; curl, wrk and iperf3 through it. With one arm and with two, half of them behind a masquerading router.
func TestPeers(t *testing.T) {
	for _, form := range []struct {
		prefix, method, family string
		arms                   arms
		masquerade             bool
	}{
		{"e2epeernat4", "fullnat", "IPv4", lab.OneArm, false}, {"e2epeernat6", "fullnat", "IPv6", lab.TwoArm, true},
		{"e2epeerdsr4", "dsr", "IPv4", lab.TwoArm, true}, {"e2epeerdsr6", "dsr", "IPv6", lab.OneArm, false},
	} {
		t.Run(form.method+"/"+form.family, func(t *testing.T) {
			topo, chat := mustTopology(t, form.arms, form.prefix, form.method, form.family == "IPv6", 3,
				lab.Options{Masquerade: form.masquerade})
			testPeers(t, topo, chat)
		})
	}
}

func testPeers(t *testing.T, topo *lab.Topology, chat service) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	web, iperf := chat, chat
	web.port, iperf.port = httpPort, iperfPort
	iperf.extra = []string{"affinity: client"} // its control and data connections belong together
	uploads := make(chan string, 1)
	for _, b := range topo.Backends() {
		mustStart(t, b.Node, "/usr/bin/python3", mustPath(t, "peers/server.py"), b.Name(), fmt.Sprint(websocketPort))
		mustStart(t, b.Node, "iperf3", "--server", "--port", fmt.Sprint(iperfPort))
		mustServeHTTP(t, b, uploads)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 1s")
	e.write(chat, web, iperf)
	e.start()

	t.Run("node ws to python websockets", func(t *testing.T) {
		if _, err := os.Stat(mustPath(t, "peers") + "/node_modules/ws"); err != nil {
			t.Fatalf("the Node package ws is missing (npm ci in test/e2e/peers; make test does it): %v", err)
		}
		out := mustRun(ctx, t, e, topo.Clients, "node", mustPath(t, "peers/client.js"), "ws://"+chat.addrPort().String(), "200", "16")
		var got struct {
			Open, Closed, Echoes, Bytes int
			Servers                     map[string]int
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got.Open != 200 || got.Closed != 200 || got.Echoes != 3200 || len(got.Servers) != 3 {
			t.Errorf("want 200 opened and closed, 3200 echoes, 3 servers; got %s", out)
		}
		t.Log(strings.TrimSpace(out))
	})
	t.Run("curl", func(t *testing.T) {
		url := "http://" + web.addrPort().String()
		want := hex.EncodeToString(sum(io.LimitReader(pattern(), *bulk)))
		began := time.Now()
		out := mustRun(ctx, t, e, topo.Clients, "sh", "-c",
			fmt.Sprintf("curl --silent --show-error --fail --globoff '%s/bytes/%d' | sha256sum", url, *bulk))
		if got, _, _ := strings.Cut(out, " "); got != want {
			t.Errorf("%d bytes came from the backend with checksum %s, want %s", *bulk, got, want)
		}
		t.Logf("%d MiB from the backend in %v", *bulk>>20, time.Since(began).Round(time.Millisecond))

		file := filepath.Join(t.TempDir(), "upload")
		mustWrite(t, file, io.LimitReader(pattern(), *bulk))
		began = time.Now()
		mustRun(ctx, t, e, topo.Clients, "curl", "--silent", "--show-error", "--fail", "--globoff", "--upload-file", file, url+"/upload")
		if got := <-uploads; got != want {
			t.Errorf("%d bytes went to the backend with checksum %s, want %s", *bulk, got, want)
		}
		t.Logf("%d MiB to the backend in %v", *bulk>>20, time.Since(began).Round(time.Millisecond))
	})
	t.Run("wrk", func(t *testing.T) {
		out := mustRun(ctx, t, e, topo.Clients, "wrk", "--threads", "2", "--connections", "60", "--duration", "2s",
			"http://"+web.addrPort().String()+"/bytes/100")
		if strings.Contains(out, "Socket errors") || strings.Contains(out, "Non-2xx") || !strings.Contains(out, "requests in") {
			t.Errorf("wrk met errors:\n%s", out)
		}
		t.Log(regexp.MustCompile(`Requests/sec.*`).FindString(out))
	})
	t.Run("iperf3", func(t *testing.T) {
		for _, direction := range [][]string{nil, {"--reverse"}} {
			args := append([]string{"iperf3", "--client", iperf.address.String(), "--port", fmt.Sprint(iperfPort), "--time", "1",
				"--parallel", "4", "--json"}, direction...)
			out := mustRun(ctx, t, e, topo.Clients, args...)
			var got struct {
				End struct {
					Sum struct {
						BitsPerSecond float64 `json:"bits_per_second"`
					} `json:"sum_received"`
				}
			}
			if err := json.Unmarshal([]byte(out), &got); err != nil || got.End.Sum.BitsPerSecond == 0 {
				t.Fatalf("iperf3 %v brought nothing: %v\n%s", direction, err, out)
			}
			t.Logf("iperf3 %v: %.1f Gbit/s", direction, got.End.Sum.BitsPerSecond/1e9)
		}
	})
}

func mustPath(t *testing.T, path string) string {
	t.Helper()
	abs, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

func mustStart(t *testing.T, node *lab.Node, argv ...string) {
	t.Helper()
	if _, err := node.Start(node.Command(context.Background(), argv...)); err != nil {
		t.Fatal(err)
	}
}

// mustRun runs a program to its end; servers may have only just been started, so it is tried for some seconds.
func mustRun(ctx context.Context, t *testing.T, e *edge, node *lab.Node, argv ...string) string {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		cmd := node.Command(ctx, argv...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err == nil {
			return string(out)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			t.Fatalf("%v: %v: %s%s\nthe daemon's log:\n%s", argv, err, stderr.String(), out, e.log())
		}
	}
}

// pattern is the same bytes each time.
func pattern() io.Reader { return rand.NewChaCha8([32]byte{}) }

func sum(r io.Reader) []byte {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		panic(err)
	}
	return h.Sum(nil)
}

func mustWrite(t *testing.T, path string, r io.Reader) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, r); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// mustServeHTTP serves /bytes/N, N bytes of the pattern, and /upload, whose checksum it tells.
func mustServeHTTP(t *testing.T, b *lab.Backend, uploads chan<- string) {
	t.Helper()
	var listener net.Listener
	if err := b.Do(func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), httpPort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		var n int64
		if _, err := fmt.Sscan(r.PathValue("n"), &n); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(n))
		io.CopyN(w, pattern(), n)
	})
	mux.HandleFunc("PUT /upload", func(_ http.ResponseWriter, r *http.Request) {
		var h hash.Hash = sha256.New()
		if _, err := io.Copy(h, r.Body); err != nil {
			uploads <- err.Error()
			return
		}
		uploads <- hex.EncodeToString(h.Sum(nil))
	})
	server := &http.Server{Handler: mux}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}
